/* A root that each cell can write to: an overlay of its own, with the layers below and the cell's tmpfs
 * above. It goes with the cell; nobody else has seen it.
 *
 * The template keeps the layers at /.lower/0, 1, ..., the highest first, and at /.lower/etc what a root
 * without one is given. init mounts the overlay, moves over what is mounted already, and
 * makes it its root; with the template's own root go the layers' mounts. */
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "zygote.h"

#define NEW_ROOT "/.root"

struct own {
    int proc, namespace;
};

/* One's own may always be opened, another's not while we are not dumpable. */
static int open_own(void *arg)
{
    struct own *own = arg;
    own->namespace = openat(own->proc, "self/ns/user", O_RDONLY | O_CLOEXEC);
    return 0;
}

/* A user namespace in which 0, the layers' owner, is the job. It lives by its descriptor: the process
 * that it comes with opens that in our table and ends, before we go on. With a memory and a table of its
 * own it would cost as much as all of the mounts. The maps are written while it is not reaped yet. */
static int owner_namespace(struct zygote *z, const struct slot *s)
{
    _Alignas(16) char stack[8192];
    char map[32];
    struct own own = {.proc = z->proc, .namespace = -1};
    const int flags = CLONE_VM | CLONE_VFORK | CLONE_FILES | CLONE_NEWUSER | SIGCHLD;
    pid_t pid = clone(open_own, stack + sizeof(stack), flags, &own);
    if (pid < 0 || own.namespace < 0)
        return -1;
    cleanup_close int namespace = own.namespace;
    snprintf(map, sizeof(map), "0 %u 1\n", slot_ids(z, s) + 1);
    if (write_proc(z->proc, pid, "uid_map", map) < 0 ||
        write_proc(z->proc, pid, "gid_map", map) < 0)
        return -1;
    return steal_fd(&namespace);
}

/* Jobs have ids that own nothing on this host. A mapped mount makes the layers' owner theirs, below an
 * overlay since 5.19; rootless, with one id, they are the job's already. */
int writable_layers(struct zygote *z, const struct slot *s, struct cell *cell, struct failure *f)
{
    char path[32];
    if (z->config.nlower == 0 || z->config.mode != IDS_ROOT)
        return 0;
    cleanup_close int owner = owner_namespace(z, s);
    if (owner < 0)
        return fail(f, "owner of the layers");
    for (unsigned i = 0; i < z->config.nlower; i++) {
        struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)owner};
        snprintf(path, sizeof(path), "/.lower/%u", i);
        cell->lower[i] = sys_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
        if (cell->lower[i] < 0)
            return fail(f, "clone layer");
        if (syscall(SYS_mount_setattr, cell->lower[i], "", AT_EMPTY_PATH, &attr, sizeof(attr)) < 0)
            return fail(f, "map layer");
    }
    return 0;
}

/* Once, before any cell: what cannot be mapped is told where the pool is opened. */
int writable_try(struct zygote *z, struct failure *f)
{
    struct cell cell;
    cell_clear(&cell, &z->config);
    int result = writable_layers(z, z->slots, &cell, f);
    writable_close(&cell);
    return result;
}

void writable_close(struct cell *cell)
{
    for (unsigned i = 0; i < MAX_LOWER; i++)
        close_fd(&cell->lower[i]);
}

static int mount_root(struct cell *cell, struct failure *f)
{
    char options[2048], layer[32];
    size_t n = (size_t)snprintf(options, sizeof(options), "lowerdir=");
    for (unsigned i = 0; i < cell->config->nlower; i++) {
        snprintf(layer, sizeof(layer), "/.lower/%u", i);
        /* Over the template's: before 6.15 overlayfs takes no layer that is not attached. */
        if (cell->lower[i] >= 0 &&
            sys_move_mount(cell->lower[i], "", AT_FDCWD, layer, MOVE_MOUNT_F_EMPTY_PATH) < 0)
            return fail(f, "attach layer");
        n += (size_t)snprintf(options + n, sizeof(options) - n, i ? ":%s" : "%s", layer);
    }
    writable_close(cell);
    snprintf(options + n, sizeof(options) - n,
             ",upperdir=/tmp/root,workdir=/tmp/rootwork,userxattr");
    if (make_dir(cell->config, "/tmp/root", 0755) < 0 || mkdir("/tmp/rootwork", 0700) < 0)
        return fail(f, "mkdir for the root");
    if (mount("isojob", NEW_ROOT, "overlay", MS_NOSUID | MS_NODEV, options) < 0)
        return fail(f, "overlay of the root");
    return 0;
}

/* A directory to mount something on. What is not there is made, and the job's; a link is refused, since
 * the layers are whoever's. */
static int mount_point(const struct config *c, int root, const char *path)
{
    char name[256];
    cleanup_close int at = fcntl(root, F_DUPFD_CLOEXEC, 3);
    for (size_t n; at >= 0 && *(path += strspn(path, "/")); path += n) {
        n = strcspn(path, "/");
        if (n >= sizeof(name)) {
            errno = ENAMETOOLONG;
            return -1;
        }
        memcpy(name, path, n);
        name[n] = 0;
        if (mkdirat(at, name, 0755) < 0
                ? errno != EEXIST
                : fchownat(at, name, c->job_uid, c->job_gid, AT_SYMLINK_NOFOLLOW) < 0)
            return -1;
        int next = openat(at, name, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        close_fd(&at);
        at = next;
    }
    return steal_fd(&at);
}

/* What the template shows at this path, with the mounts below it, in the new root as well; or, if it
 * was mounted for this cell, instead. */
static int carry(const struct config *c, int root, const char *path, bool move)
{
    cleanup_close int to = mount_point(c, root, path);
    cleanup_close int from =
        to < 0 ? -1
               : sys_open_tree(AT_FDCWD, path,
                               OPEN_TREE_CLOEXEC |
                                   (move ? 0 : OPEN_TREE_CLONE | (unsigned)AT_RECURSIVE));
    return from < 0 ? -1
                    : sys_move_mount(from, "", to, "",
                                     MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* /dev, /proc and /tmp are directories of ours: whatever else has the name, such as a link, is replaced. */
static int carry_ours(const struct config *c, int root, const char *path, bool move,
                      struct failure *f)
{
    int result = carry(c, root, path, move);
    if (result < 0 && errno == ENOTDIR && unlinkat(root, path + 1, 0) == 0)
        result = carry(c, root, path, move);
    return result < 0 ? fail_at(f, "mount of the new root", path) : 0;
}

/* Only where there is none: the one of an image says who its users are. */
static int put_etc(const struct config *c, int root)
{
    cleanup_close int template = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    int there = template < 0 ? -1 : is_there(root, "etc");
    if (there)
        return there < 0 ? -1 : 0;
    if (copy_tree(template, ".lower/etc", root, "etc") < 0)
        return -1;
    return fchownat(root, "etc", c->job_uid, c->job_gid, AT_SYMLINK_NOFOLLOW);
}

/* The cell's proc and tmpfs are mounted already: the kernel wants to see a whole proc, which is the
 * template's, before it gives another. The launcher's root and working directory follow by themselves. */
int writable_enter(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    if (mount_root(cell, f) < 0)
        return -1;
    cleanup_close int root = open(NEW_ROOT, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return fail(f, "open the new root");
    if (put_etc(c, root) < 0)
        return fail(f, "/etc of the root");
    if (carry_ours(c, root, "/dev", false, f) < 0 || carry_ours(c, root, "/proc", true, f) < 0 ||
        carry_ours(c, root, "/tmp", true, f) < 0)
        return -1;
    /* A session has mounted its directory there; else it is only made. */
    cleanup_close int workdir = mount_point(c, root, c->workdir);
    if (workdir < 0 || (cell->session && carry(c, root, c->workdir, false) < 0))
        return fail_at(f, "mount target", c->workdir);
    if (fchdir(root) < 0 || sys_pivot_root(".", ".") < 0)
        return fail(f, "pivot_root of the cell");
    if (umount2(".", MNT_DETACH) < 0 || chdir("/") < 0)
        return fail(f, "detach the template's root");
    return 0;
}
