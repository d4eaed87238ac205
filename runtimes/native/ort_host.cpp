#include "ort_host.h"

#include "errors.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

constexpr int CHANNEL = 3;  // where the host finds its end
constexpr int64_t MOST_BYTES = int64_t(1) << 28;  // of a message; tensors follow behind it

// In the child: become the host, or tell why not.
[[noreturn]] void become(const char * program, const char * library, int channel, int telling, pid_t parent) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // it never outlives the runner, however that ends
    if (getppid() != parent) _exit(0);
    if (telling <= CHANNEL) telling = fcntl(telling, F_DUPFD_CLOEXEC, CHANNEL + 1);
    if (channel == CHANNEL) fcntl(channel, F_SETFD, 0);
    else dup2(channel, CHANNEL);
    std::signal(SIGPIPE, SIG_DFL);
    char * const words[] = {const_cast<char *>(program), const_cast<char *>(library), nullptr};
    execv(program, words);
    const int reason = errno;
    const ssize_t ignored = write(telling, &reason, sizeof reason);
    _exit(ignored < 0 ? 126 : 127);
}

}  // namespace

Request & Request::number(int64_t value) {
    const char * from = reinterpret_cast<const char *>(&value);
    bytes_.insert(bytes_.end(), from, from + sizeof value);
    return *this;
}

Request & Request::data(const void * from, size_t bytes) {
    number(bytes);
    const size_t begin = bytes_.size();
    bytes_.resize(begin + WIRE_PADDED(bytes));
    if (bytes) std::memcpy(bytes_.data() + begin, from, bytes);
    return *this;
}

Request & Request::shape(int type, const std::vector<int64_t> & sizes) {
    number(type).number(sizes.size());
    for (int64_t size : sizes) number(size);
    return *this;
}

Request & Request::append(const Request & part) {
    bytes_.insert(bytes_.end(), part.bytes_.begin(), part.bytes_.end());
    return *this;
}

int64_t Reply::number() {
    int64_t value = 0;
    if (bytes_.size() - at_ < sizeof value) throw worker_error("the process of ONNX Runtime sent a torn reply", "a bug");
    std::memcpy(&value, bytes_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
}

std::string Reply::text() {
    const int64_t size = number();
    if (size < 0 || uint64_t(size) > bytes_.size() || WIRE_PADDED(size) > bytes_.size() - at_) {
        throw worker_error("the process of ONNX Runtime sent a torn reply", "a bug");
    }
    const std::string value(bytes_.data() + at_, size);
    at_ += WIRE_PADDED(size);
    return value;
}

OrtHost::OrtHost(const std::string & program, const std::string & library) {
    int channel[2], telling[2];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) != 0 || pipe2(telling, O_CLOEXEC) != 0) {
        throw Error("ResourceExhausted", std::string("no channel to ONNX Runtime: ") + std::strerror(errno), "free some");
    }
    const pid_t parent = getpid();
    process_ = fork();
    if (process_ == 0) become(program.c_str(), library.c_str(), channel[1], telling[1], parent);
    const int reason = process_ < 0 ? errno : 0;
    close(channel[1]);
    close(telling[1]);
    channel_ = channel[0];
    int wrong = reason;
    if (!reason && read(telling[0], &wrong, sizeof wrong) != sizeof wrong) wrong = 0;
    close(telling[0]);
    if (wrong) {
        end();
        const std::string hint = wrong == ENOENT ? "it needs the system's own dynamic loader (glibc's, on Android bionic's)"
                                                 : "edgestill devices build-runner makes it";
        throw Error("MissingDependency", program + " can't be started here: " + std::strerror(wrong), hint);
    }
    try {
        version_ = answer().text();
    } catch (const Refusal & refusal) {
        end();
        throw bad_input(library + " can't be used: " + refusal.what(),
                        "give a libonnxruntime.so for this system and processor, version 1.4 or newer");
    }
}

OrtHost::~OrtHost() { end(); }

void OrtHost::end() {
    if (channel_ >= 0) close(channel_);
    if (process_ > 0) {
        kill(process_, SIGKILL);
        while (waitpid(process_, nullptr, 0) < 0 && errno == EINTR) {}
    }
    channel_ = -1;
    process_ = 0;
}

Reply OrtHost::ask(const Request & request) {
    if (channel_ < 0) throw worker_error("the process of ONNX Runtime is gone", "start another worker");
    const int64_t size = request.bytes().size();
    auto send_all = [this](const void * from, size_t bytes) {
        for (const char * at = static_cast<const char *>(from); bytes > 0;) {
            const ssize_t sent = send(channel_, at, bytes, MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR) continue;
            if (sent <= 0) mourn();
            at += sent;
            bytes -= sent;
        }
    };
    send_all(&size, sizeof size);
    send_all(request.bytes().data(), size);
    return answer();
}

void OrtHost::take(void * to, size_t bytes) { read_all(to, bytes); }

Reply OrtHost::answer() {
    int64_t size = 0;
    read_all(&size, sizeof size);
    if (size < 0 || size > MOST_BYTES) throw worker_error("the process of ONNX Runtime sent a torn reply", "a bug");
    std::vector<char> bytes(size);
    read_all(bytes.data(), size);
    Reply reply(std::move(bytes));
    if (reply.number() != 0) {
        std::string why = reply.text();
        throw Refusal(why.substr(0, std::min<size_t>(why.find('\n'), 300)));
    }
    return reply;
}

void OrtHost::read_all(void * to, size_t bytes) {
    for (char * at = static_cast<char *>(to); bytes > 0;) {
        const ssize_t got = read(channel_, at, bytes);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) mourn();
        at += got;
        bytes -= got;
    }
}

// The host is gone. One that died of a signal takes this process with it by the same signal: whoever watches the worker
// sees what it would see if the library had been loaded here (SIGILL: not for this processor; SIGKILL: no memory).
void OrtHost::mourn() {
    int status = 0;
    while (waitpid(process_, &status, 0) < 0 && errno == EINTR) {}
    close(channel_);
    channel_ = -1;
    process_ = 0;
    if (WIFSIGNALED(status)) {
        std::fprintf(stderr, "edgestill-runner: the process of ONNX Runtime died of signal %d\n", WTERMSIG(status));
        std::signal(WTERMSIG(status), SIG_DFL);
        kill(getpid(), WTERMSIG(status));
        pause();
    }
    throw worker_error("the process of ONNX Runtime ended with status " + std::to_string(WEXITSTATUS(status)),
                       "its last lines on standard error say why");
}
