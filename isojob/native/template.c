/* A template: a warm interpreter, that the launchers of this zygote's cells are forked from. It runs
 * what the host preloads, code that nobody has to trust with the host: without capabilities, as ids of
 * its own, under limits and a filter, in namespaces of its own but for the user namespace, which has
 * to be the parent of its cells'.
 *
 *   zygote --FORK + a socket--> template: clones pid 1 of a cell as a child of the zygote
 *                               (CLONE_PARENT), which forks the launcher and executes init
 *   init --HELLO--> zygote: writes its maps, and sends what the cell is made of (handover.c)
 *
 * It never sees a lease, a cgroup or a job. Its pid namespace has a pid 1 of ours that does nothing;
 * with it dies everything that came from the template. */
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include "zygote.h"

#define TEMPLATE_CELL UINT32_MAX /* its cgroup's number; the host's own begin at 0 */

/* What it is executed with, by number; isojob/_warm/runner.py knows them. */
enum { FD_REQUESTS = 3, FD_PROGRAM = 4, FD_CONFIG = 5 };

_Noreturn static void reaper_main(const struct zygote *z)
{
    struct pollfd alive = {.fd = z->alive_read};
    prctl(PR_SET_NAME, "isojob-reaper");
    close(z->alive_write);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) < 0)
        _exit(1);
    /* First this: without its capabilities, a template of the same uid could trace it. */
    if (prctl(PR_SET_DUMPABLE, 0) < 0 || set_capabilities(0) < 0 || close_all_but(&alive.fd, 1) < 0)
        _exit(1);
    struct sigaction ignore = {.sa_handler = SIG_IGN}; /* no zombies */
    sigaction(SIGCHLD, &ignore, NULL);
    /* The zygote may have ended before we asked for the signal, and a template that has just begun still
     * hold the pipe, too: one look would not tell. */
    while (poll(&alive, 1, -1) < 0 && errno == EINTR)
        ;
    _exit(0);
}

static bool mounts_in_workdir(const struct config *c)
{
    size_t len = strlen(c->workdir);
    for (unsigned i = 0; i < c->nmounts; i++)
        if (strncmp(c->mounts[i].path, c->workdir, len) == 0 && c->mounts[i].path[len] == '/')
            return true;
    return false;
}

static int own_tree(const struct config *c, struct failure *f)
{
    if (unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) < 0)
        return fail(f, "template's namespaces");
    /* Of its own pid namespace; the cells' may be mounted only where a whole one shows. */
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
        return fail(f, "template's /proc");
    if (mount("isojob", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=64m") < 0)
        return fail(f, "template's /tmp");
    /* The targets of the caller's mounts are made there. */
    if (mounts_in_workdir(c) &&
        mount("isojob", c->workdir, "tmpfs", MS_NOSUID | MS_NODEV, "mode=555,size=64k") < 0)
        return fail(f, "template's working directory");
    if (inside_mounts(c, f) < 0)
        return -1;
    return sethostname(c->hostname, strlen(c->hostname)) < 0 ? fail(f, "sethostname") : 0;
}

static int own_ids(const struct config *c, uint32_t slot, struct failure *f)
{
    uint32_t id = c->uid_base + 2 * slot;
    if (drop_bounding_set() < 0)
        return fail(f, "bounding set");
    if (c->mode != IDS_SINGLE && (setresgid(id, id, id) < 0 || setresuid(id, id, id) < 0))
        return fail(f, "template's ids");
    /* Not 0, which a core_pattern that pipes ignores (core(5)). */
    const struct rlimit core = {.rlim_cur = 1, .rlim_max = 1};
    if (setrlimit(RLIMIT_CORE, &core) < 0)
        return fail(f, "rlimit");
    if (prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0 || set_capabilities(0) < 0)
        return fail(f, "drop capabilities");
    for (unsigned i = 0; i < c->nrlimits; i++)
        if (set_rlimit(&c->rlimits[i], 0, f) < 0)
            return -1;
    return 0;
}

static int place(int *fd, int target)
{
    if (dup3(*fd, target + 64, 0) < 0) /* none of the three may be in another's place */
        return -1;
    *fd = target + 64;
    return 0;
}

static int own_descriptors(const struct warm *w, int sock, struct failure *f)
{
    int fds[] = {sock, w->program, w->config};
    for (int i = 0; i < 3; i++)
        if (place(&fds[i], FD_REQUESTS + i) < 0)
            return fail(f, "template's descriptors");
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], FD_REQUESTS + i) < 0)
            return fail(f, "template's descriptors");
    int null = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++)
        if (null < 0 || dup2(null, i) < 0)
            return fail(f, "template's descriptors");
    const int keep[] = {FD_REQUESTS, FD_PROGRAM, FD_CONFIG};
    return close_all_but(keep, ARRAY_LEN(keep)) < 0 ? fail(f, "close descriptors") : 0;
}

_Noreturn static void template_main(struct zygote *z, struct cell *cell, int sock, uint32_t slot)
{
    const struct config *c = &z->config;
    struct failure f = {0};
    sigset_t none;
    if (setsid() < 0 || join_keyring() < 0)
        fail(&f, "template's session");
    else if (cgroup_attach(cell, &f) == 0 && own_tree(c, &f) == 0 && own_ids(c, slot, &f) == 0 &&
             own_descriptors(&z->warm, sock, &f) == 0) {
        sock = FD_REQUESTS;
        sigemptyset(&none);
        sigprocmask(SIG_SETMASK, &none, NULL);
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (c->template_filter.len &&
            syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &c->template_filter) < 0)
            fail(&f, "template's filter");
        else {
            execve(c->template_argv[0], c->template_argv, c->template_envp);
            fail_at(&f, "execute", c->template_argv[0]);
        }
    }
    report_error(sock, &f);
    _exit(1);
}

static int make_namespace(struct zygote *z, struct failure *f)
{
    struct warm *w = &z->warm;
    if (unshare(CLONE_NEWPID) < 0)
        return fail(f, "pid namespace");
    struct clone_args args = {.exit_signal = SIGCHLD};
    w->reaper = sys_clone3(&args);
    if (w->reaper == 0)
        reaper_main(z);
    if (w->reaper < 0)
        return fail(f, "clone reaper");
    /* Launchers are pid 2 of their namespaces. A template must be another: libraries tell a fork by
     * getpid(). */
    pid_t second = sys_clone3(&args);
    if (second == 0)
        _exit(0);
    return second < 0 || waitpid(second, NULL, __WALL) < 0 ? fail(f, "clone") : 0;
}

int template_pair(int *ours, int *theirs, struct failure *f)
{
    int pair[2], on = 1;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return fail(f, "socketpair");
    *ours = pair[0];
    *theirs = pair[1];
    return setsockopt(*ours, SOL_SOCKET, SO_PASSCRED, &on, sizeof(on)) < 0 ? fail(f, "socketpair")
                                                                           : 0;
}

static int launch(struct zygote *z, struct cell *cell, struct failure *f)
{
    struct warm *w = &z->warm;
    struct template *t = &w->templates[0];
    struct clone_args args = {.exit_signal = SIGCHLD};
    cleanup_close int theirs = -1;
    if (template_pair(&t->sock, &theirs, f) < 0)
        return -1;
    t->pid = sys_clone3(&args);
    if (t->pid == 0)
        template_main(z, cell, theirs, (uint32_t)(w->slot - z->slots));
    if (t->pid < 0)
        return fail(f, "clone template");
    t->begun = true;
    w->slot->pid = t->pid;
    z->live++;
    return 0;
}

int template_start(struct zygote *z, struct failure *f)
{
    struct warm *w = &z->warm;
    const struct config *c = &z->config;
    struct cell cell;
    for (unsigned i = 0; i < MAX_TEMPLATES; i++)
        w->templates[i] = (struct template){.sock = -1, .host = -1};
    cell_clear(&cell, c);
    cell.warm = true;
    cell.nwrites = c->ntemplate_writes;
    memcpy(cell.writes, c->template_writes, sizeof(c->template_writes));
    w->program = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    if (w->program < 0)
        return fail(f, "own executable");
    if (make_namespace(z, f) < 0)
        return -1;
    w->slot = free_slot(z);
    *w->slot = (struct slot){.lease = -1, .id = TEMPLATE_CELL, .mask = c->template_mask};
    int result = -1;
    if (cell_cgroups(z, w->slot, &cell, f) == 0 && cgroup_open(&cell, f) == 0)
        result = launch(z, &cell, f);
    if (result < 0)
        cell_remove(z, w->slot);
    for (unsigned i = 0; i < MAX_HIERARCHIES; i++)
        close_fd(&cell.dir[i]);
    cgroup_close(&cell);
    return result;
}
