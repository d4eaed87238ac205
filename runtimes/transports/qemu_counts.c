/* A plugin of QEMU's code generator that counts the AArch64 instructions that a program executes, by class.
 *
 * Built on demand (qemu_plugin.py) and loaded with -plugin; it maps the file of its argument "counts=" and keeps the
 * counts there while the program runs, so that they can be read between two requests to a worker:
 *
 *     uint64 magic, classes, slots; then slots * classes uint64 counters; slot = virtual CPU (thread) modulo slots
 *
 * The words are classified once, when a block is translated; a block that runs adds its numbers. The interface of QEMU
 * is declared here as its documentation describes it ("QEMU TCG Plugins"), since Debian packs no header; API is the
 * version of that interface (1: until 8.2, 2: 9.0, 3: from 9.1). Encodings: Arm Architecture Reference Manual,
 * chapters C4.1 and C7.2.
 */

#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct qemu_plugin_tb *));
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, void (*)(unsigned int, void *), int, void *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
#if API < 3
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
#else
size_t qemu_plugin_insn_data(const struct qemu_plugin_insn *, void *, size_t);
#endif

__attribute__((visibility("default"))) int qemu_plugin_version = API;

enum class { DOT, MMLA, FMLA, LOAD, STORE, OTHER, CLASSES };
enum { SLOTS = 64, HEADER = 3 };
#define MAGIC 0x31544e434c495453ull

static uint64_t *counters;

struct block {
    uint32_t count[CLASSES];
};

#define IS(mask, value) ((word & (mask)) == (value))

/* int8 dot products: SDOT, UDOT (vectors, by element), USDOT, SUDOT, and those of SVE */
static int is_dot(uint32_t word)
{
    return IS(0x9fe0fc00, 0x0e809400) || /* SDOT UDOT, vectors: U is bit 29 */
           IS(0x9fc0f400, 0x0f80e000) || /* SDOT UDOT, by element */
           IS(0xbfe0fc00, 0x0e809c00) || /* USDOT, vectors */
           IS(0xbfc0f400, 0x0f80f000) || /* USDOT, by element */
           IS(0xbfc0f400, 0x0f00f000) || /* SUDOT, by element */
           IS(0xffa0f800, 0x44800000) || /* SVE SDOT UDOT, vectors */
           IS(0xffa0f800, 0x44a00000) || /* SVE SDOT UDOT, indexed */
           IS(0xffe0fc00, 0x44807800) || /* SVE USDOT, vectors */
           IS(0xffe0f800, 0x44a01800);   /* SVE USDOT SUDOT, indexed */
}

/* matrix products: SMMLA, UMMLA, USMMLA, BFMMLA, and those of SVE */
static int is_mmla(uint32_t word)
{
    return IS(0xdfe0fc00, 0x4e80a400) || IS(0xffe0fc00, 0x4e80ac00) || IS(0xffe0fc00, 0x6e40ec00) ||
           IS(0xff20fc00, 0x45009800) || IS(0xff20fc00, 0x6420e400);
}

/* floating-point multiply-adds: FMLA, FMLS (vectors, by element, half precision, long), FMADD and its kin, SVE's */
static int is_fmla(uint32_t word)
{
    return IS(0xbf20fc00, 0x0e20cc00) || /* FMLA FMLS, vectors of 32 and 64 bits */
           IS(0xbf60fc00, 0x0e400c00) || /* FMLA FMLS, vectors of 16 bits */
           IS(0xbf80b400, 0x0f801000) || /* by element, 32 and 64 bits */
           IS(0xbfc0b400, 0x0f001000) || /* by element, 16 bits */
           IS(0xff80b400, 0x5f801000) || /* scalar by element, 32 and 64 bits */
           IS(0xffc0b400, 0x5f001000) || /* scalar by element, 16 bits */
           IS(0xbfc0b400, 0x0f800000) || /* FMLAL FMLSL, by element */
           IS(0xbfc0b400, 0x2f808000) || /* FMLAL2 FMLSL2, by element */
           IS(0xbf60fc00, 0x0e20ec00) || /* FMLAL FMLSL */
           IS(0xbf60fc00, 0x2e20cc00) || /* FMLAL2 FMLSL2 */
           IS(0x7f000000, 0x1f000000) || /* FMADD FMSUB FNMADD FNMSUB, scalars */
           IS(0xff20c000, 0x65200000) || /* SVE FMLA FMLS, vectors */
           IS(0xff20f800, 0x64200000);   /* SVE FMLA FMLS, indexed */
}

static enum class of_memory(uint32_t word)
{
    uint32_t opc = word >> 22 & 3, size = word >> 30, vector = word >> 26 & 1;
    if (IS(0x3b000000, 0x18000000)) /* literal; PRFM is no load */
        return !vector && size == 3 ? OTHER : LOAD;
    if (IS(0x3a000000, 0x28000000) || /* pairs */
        IS(0x3f000000, 0x08000000) || /* exclusive and ordered */
        IS(0xbe000000, 0x0c000000))   /* structures */
        return word >> 22 & 1 ? LOAD : STORE;
    if (IS(0x3b200c00, 0x38200000) && !vector) /* atomics read and write: once, as loads */
        return LOAD;
    if (IS(0x3a000000, 0x38000000) || IS(0x3f200c00, 0x19000000)) { /* single registers; LDAPUR, STLUR */
        if (vector)
            return opc & 1 ? LOAD : STORE;
        return opc == 0 ? STORE : opc == 2 && size == 3 ? OTHER : LOAD;
    }
    return OTHER;
}

static enum class classify(uint32_t word)
{
    if (is_dot(word))
        return DOT;
    if (is_mmla(word))
        return MMLA;
    if (is_fmla(word))
        return FMLA;
    if (IS(0x0a000000, 0x08000000))
        return of_memory(word);
    if (IS(0xfe000000, 0x84000000) || IS(0xfe000000, 0xa4000000) || IS(0xfe000000, 0xc4000000))
        return LOAD; /* SVE */
    if (IS(0xfe000000, 0xe4000000))
        return STORE; /* SVE */
    return OTHER;
}

static void executed(unsigned int cpu, void *data)
{
    const struct block *block = data;
    uint64_t *slot = counters + HEADER + (size_t)(cpu % SLOTS) * CLASSES;
    for (int i = 0; i < CLASSES; i++)
        if (block->count[i])
            __atomic_fetch_add(slot + i, block->count[i], __ATOMIC_RELAXED);
}

static void translated(plugin_id id, struct qemu_plugin_tb *tb)
{
    struct block *block = calloc(1, sizeof *block); /* lives as long as the translation may */
    size_t count = qemu_plugin_tb_n_insns(tb);
    (void)id;
    if (block == NULL)
        abort();
    for (size_t i = 0; i < count; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        uint32_t word = 0;
#if API < 3
        memcpy(&word, qemu_plugin_insn_data(insn), sizeof word);
#else
        qemu_plugin_insn_data(insn, &word, sizeof word);
#endif
        block->count[classify(word)]++;
    }
    qemu_plugin_register_vcpu_tb_exec_cb(tb, executed, 0, block);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv)
{
    size_t bytes = (HEADER + (size_t)SLOTS * CLASSES) * sizeof(uint64_t);
    (void)info;
    if (argc < 1 || strncmp(argv[0], "counts=", 7) != 0)
        return -1;
    int file = open(argv[0] + 7, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)bytes) != 0)
        return -1;
    counters = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (counters == MAP_FAILED)
        return -1;
    counters[1] = CLASSES;
    counters[2] = SLOTS;
    counters[0] = MAGIC;
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    return 0;
}
