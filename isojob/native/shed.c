/* What zygote and init give up for themselves once they do not need it any more: whoever takes one of
 * them over finds less in his hands.
 *
 * init gets a filter, after it has forked the launcher: jobs do not inherit it. The zygote gets none,
 * since all that it forks would have it, the job of an unconfined profile too; it drops capabilities,
 * which its cells get anew with their user namespace. */
#include <linux/audit.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <linux/securebits.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include "zygote.h"

#if defined(__x86_64__)
#define NATIVE_ARCH AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE_ARCH AUDIT_ARCH_AARCH64
#else
#error "isojob runs on x86_64 and aarch64"
#endif

/* All that loop(), finish() and collect_files() need, and what the C library may do on their behalf.
 * Anything else, process creation and execve among it, is EPERM. */
static const uint16_t init_calls[] = {
#ifdef SYS_poll
    SYS_poll,
#endif
    SYS_ppoll,
    SYS_read,
    SYS_pread64,
    SYS_write, /* stack protector's and sanitizers' last words */
    SYS_pwrite64,
    SYS_writev,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_setsockopt,
    SYS_waitid,
    SYS_kill,
    SYS_timerfd_settime,
    SYS_clock_gettime, /* where the vDSO has no clock */
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_restart_syscall, /* poll after SIGSTOP and SIGCONT */
    SYS_sched_yield,
    SYS_openat,
    SYS_openat2,
    SYS_close,
    SYS_fcntl,
    SYS_getdents64,
    SYS_newfstatat,
    SYS_fstat,
    SYS_statx,
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_futex,
    SYS_getrandom,
    SYS_rt_sigaction, /* abort() */
    SYS_rt_sigprocmask,
    SYS_getpid,
    SYS_gettid,
    SYS_tgkill,
    SYS_exit,
    SYS_exit_group,
#ifdef __SANITIZE_ADDRESS__
    SYS_sigaltstack,
#endif
};

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
#define IF_EQUAL(value, yes, no) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, yes, no)
#define EPERM_ACTION (SECCOMP_RET_ERRNO | EPERM)

static const struct sock_filter head[] = {
    LOAD(arch),
    IF_EQUAL(NATIVE_ARCH, 1, 0),
    RETURN(EPERM_ACTION),
    LOAD(nr),
    /* Of devices and files only the job's listener is spoken to. */
    IF_EQUAL(SYS_ioctl, 0, 4),
    LOAD(args[1]), /* little-endian: the half that the kernel takes */
    IF_EQUAL((uint32_t)SECCOMP_IOCTL_NOTIF_RECV, 0, 1),
    RETURN(SECCOMP_RET_ALLOW),
    RETURN(EPERM_ACTION),
    /* Memory, but none to execute. */
    IF_EQUAL(SYS_mmap, 1, 0),
    IF_EQUAL(SYS_mprotect, 0, 4),
    LOAD(args[2]),
    BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1),
    RETURN(EPERM_ACTION),
    RETURN(SECCOMP_RET_ALLOW),
};

enum {
    HEAD = ARRAY_LEN(head),
    CALLS = ARRAY_LEN(init_calls),
    DENY = HEAD + 2 * CALLS - 1,
    ALLOW = DENY + 1,
};

static struct sock_filter code[ALLOW + 1];

/* A binary search: the kernel tries a new filter on each call there is (seccomp_cache_prepare), and
 * so every cell would pay for a long way through it. */
static unsigned search(unsigned at, const uint16_t *calls, unsigned n)
{
    if (n == 1) {
        code[at] = (struct sock_filter)IF_EQUAL(calls[0], (uint8_t)(ALLOW - at - 1),
                                                (uint8_t)(DENY - at - 1));
        return at + 1;
    }
    unsigned half = n / 2, right = search(at + 1, calls, half);
    code[at] = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JGE | BPF_K, calls[half],
                                            (uint8_t)(right - at - 1), 0);
    return search(right, calls + half, n - half);
}

static int ascending(const void *a, const void *b)
{
    return *(const uint16_t *)a - *(const uint16_t *)b;
}

void init_shed_prepare(void)
{
    _Static_assert(2 * CALLS < 256, "a jump of BPF is a byte");
    uint16_t calls[CALLS];
    memcpy(calls, init_calls, sizeof(calls));
    qsort(calls, CALLS, sizeof(calls[0]), ascending);
    memcpy(code, head, sizeof(head));
    search(HEAD, calls, CALLS);
    code[DENY] = (struct sock_filter)RETURN(EPERM_ACTION);
    code[ALLOW] = (struct sock_filter)RETURN(SECCOMP_RET_ALLOW);
}

int init_shed(void)
{
    struct sock_fprog program = {.len = ARRAY_LEN(code), .filter = code};
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

/* Mounts, maps, cgroups and uids of cells, and files of theirs; not modules, raw I/O, network,
 * clocks, reboot, tracing. */
int zygote_shed(enum id_mode mode)
{
    static const uint8_t needed[] = {
        CAP_SYS_ADMIN, CAP_SETUID, CAP_SETGID, CAP_DAC_OVERRIDE, CAP_KILL,
    };
    /* To map our own 0 into a cell, as there is no other id (verify_root_map, 5.12). */
    uint64_t caps = mode == IDS_SINGLE ? 1ULL << CAP_SETFCAP : 0;
    init_shed_prepare();
    for (unsigned i = 0; i < ARRAY_LEN(needed); i++)
        caps |= 1ULL << needed[i];
    /* Not what the caller lacks (a container without CAP_KILL): that would be EPERM. */
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {0};
    if (syscall(SYS_capget, &header, data) < 0)
        return -1;
    return set_capabilities(caps & (data[0].permitted | (uint64_t)data[1].permitted << 32));
}

int close_all_but(const int *keep, unsigned n)
{
    unsigned from = 3;
    for (;;) {
        unsigned next = ~0U;
        for (unsigned i = 0; i < n; i++)
            if (keep[i] >= (int)from && (unsigned)keep[i] < next)
                next = (unsigned)keep[i];
        if (next == ~0U)
            break;
        if (sys_close_range(from, next - 1) < 0)
            return -1;
        from = next + 1;
    }
    return sys_close_range(from, ~0U);
}

/* KEYCTL_JOIN_SESSION_KEYRING: the caller's own would come along with the credentials. */
int join_keyring(void)
{
    return syscall(SYS_keyctl, 1, NULL) < 0 && errno != ENOSYS ? -1 : 0;
}

/* By init, for itself and for the launcher it forks: after the launcher's change of uid the calls
 * would fail without a sign (CapBnd stays full, measured). The securebits are locked: no execve and
 * no setuid ever hands out a capability again. */
int drop_bounding_set(void)
{
    for (int cap = 0; cap <= 63; cap++)
        if (prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) < 0) {
            if (errno == EINVAL)
                break;
            return -1;
        }
    return prctl(PR_SET_SECUREBITS, SECURE_ALL_BITS | SECURE_ALL_LOCKS, 0, 0, 0);
}

int set_capabilities(uint64_t caps)
{
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {
        {.effective = (uint32_t)caps, .permitted = (uint32_t)caps},
        {.effective = (uint32_t)(caps >> 32), .permitted = (uint32_t)(caps >> 32)},
    };
    return (int)syscall(SYS_capset, &header, data);
}
