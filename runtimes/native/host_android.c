// Where Android's loader enters the host, instead of the C library's crtbegin: it hands what the kernel laid on the
// stack to bionic's __libc_init, which sets the library up and calls main. An executable without constructors has
// nothing else to say there.

int main(int argc, char ** argv);
__attribute__((noreturn)) void __libc_init(void * stack, void (*unused)(void), int (*start)(int, char **, char **),
                                           const void * constructors);

static int start(int argc, char ** argv, char ** environment) {
    (void) environment;
    return main(argc, argv);
}

__attribute__((noreturn, used, visibility("hidden"))) void edgestill_enter(void * stack) {
    static const void * const none[8] = {0};  // no lists of constructors, in the older and the newer form
    __libc_init(stack, 0, start, none);
}

#if defined(__aarch64__)
__asm__(".globl _start\n.type _start,%function\n_start:\n  mov x0, sp\n  b edgestill_enter\n");
#elif defined(__x86_64__)
__asm__(".globl _start\n.type _start,@function\n_start:\n  xorl %ebp, %ebp\n  movq %rsp, %rdi\n  andq $-16, %rsp\n"
        "  call edgestill_enter\n");
#else
#error "the host is built for aarch64 and x86_64"
#endif
