/* A session: a zygote forked from the pool's, whose cells share one working directory, a tmpfs in its
 * own mount namespace. With it go the namespace and the tmpfs.
 *
 * All cells of a session have the host ids of the slot that it takes in the pool's zygote: what one of
 * them leaves in the directory belongs to the next. It ends with its control socket, the host, or the
 * pool's zygote. */
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>

#include "zygote.h"

struct directory {
    uint64_t disk, inodes;
};

static int parse(struct directory *d, struct reader *r)
{
    struct field f;
    int more;
    while ((more = wire_next(r, &f)) > 0)
        if (!(f.tag == TAG_DISK && wire_u64(&f, &d->disk)) &&
            !(f.tag == TAG_INODES && wire_u64(&f, &d->inodes)))
            return -1;
    return more;
}

/* The ids inside our own user namespace, as write_maps() hands them out. */
static int mount_directory(const struct zygote *z, const struct directory *d, struct failure *f)
{
    const struct config *c = &z->config;
    uint32_t id = c->mode == IDS_SINGLE ? 0 : c->uid_base + 2 * z->ids + 1;
    char options[128];
    snprintf(options, sizeof(options), "mode=755,uid=%u,gid=%u,size=%llu,nr_inodes=%llu", id, id,
             (unsigned long long)d->disk, (unsigned long long)d->inodes);
    if (mount("isojob", c->workdir, "tmpfs", MS_NOSUID | MS_NODEV, options) < 0)
        return fail_at(f, "mount", c->workdir);
    return 0;
}

static int keep_ours(struct zygote *z, int control)
{
    const struct config *c = &z->config;
    int keep[MAX_HIERARCHIES + 5];
    unsigned n = 0;
    keep[n++] = control;
    keep[n++] = z->proc;
    keep[n++] = c->host;
    keep[n++] = c->ids_lock;
    keep[n++] = z->alive_read;
    for (unsigned i = 0; i < c->nhier; i++)
        keep[n++] = c->hier[i];
    return close_all_but(keep, n); /* leases above all: their end of file is the pool's to give */
}

_Noreturn static void session_main(struct zygote *z, uint32_t ids, int control,
                                   const struct directory *d)
{
    struct failure f = {0};
    prctl(PR_SET_NAME, "isojob-session");
    int kept = keep_ours(z, control);
    z->control = control;
    z->parent = z->alive_read;
    z->session = true;
    z->ids = ids;
    z->live = z->removing = z->next_slot = 0;
    z->stubborn = false;
    if (kept < 0)
        fail(&f, "close descriptors");
    else if (zygote_slots(z) < 0)
        fail(&f, "memory");
    else if (zygote_watch(z) < 0)
        fail(&f, "signalfd");
    else if (mount_directory(z, d, &f) == 0) {
        zygote_run(z);
        _exit(0);
    }
    report_error(control, &f);
    _exit(1);
}

void session_make(struct zygote *z, int control, struct reader *r)
{
    struct failure f = {0};
    struct directory d = {0};
    struct slot *s = free_slot(z);
    errno = s ? EBADMSG : EAGAIN;
    if (!s || parse(&d, r) < 0)
        fail(&f, s ? "session" : "slots");
    else {
        uint32_t ids = (uint32_t)(s - z->slots);
        struct clone_args args = {.flags = CLONE_NEWNS, .exit_signal = SIGCHLD};
        pid_t pid = sys_clone3(&args);
        if (pid == 0)
            session_main(z, ids, control, &d);
        if (pid > 0) {
            *s = (struct slot){.pid = pid, .lease = -1, .session = true};
            z->live++;
        } else
            fail(&f, "clone session");
    }
    if (f.error)
        report_error(control, &f);
    close(control);
}
