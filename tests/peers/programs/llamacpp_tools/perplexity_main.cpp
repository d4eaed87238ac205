// llama-perplexity, which also waits for its own log: a thread writes that, and the program as it comes may end before
// its last lines, the statistics, are out (on a busy machine more often than not).
#include "log.h"

int llama_perplexity(int argc, char ** argv);

int main(int argc, char ** argv) {
    const int status = llama_perplexity(argc, argv);
    common_log_flush(common_log_main());
    return status;
}
