/* The tree every cell copies: built from nothing on a tmpfs, then the host's own root is let go.
 *
 * The trick with the order: the tmpfs is mounted over /proc of our private mount namespace and made
 * the root by pivot_root; the host's /proc is uncovered again by that, so every bind source resolves as
 * the caller would see it. Targets are walked component by component without following links.
 *
 * The host's root is not below ours meanwhile but mounted over it, which a lookup that begins at our
 * root or at its descriptor does not see: no name leads there, whatever a caller calls his targets and
 * an image its files. Only `..` at the root would, and is never resolved there: open_parent refuses it,
 * and OURS does. Afterwards it is detached: nothing of it is reachable but what was bound. */
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/sysmacros.h>

#include <linux/magic.h>

#include "zygote.h"

/* How a source is resolved: as the caller would, or in what we have built. */
#define HOSTS (RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
#define OURS (RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS)

static const struct {
    const char *name;
    unsigned minor;
    unsigned major;
} nodes[] = {
    {"null", 3, 1},   {"zero", 5, 1},    {"full", 7, 1},
    {"random", 8, 1}, {"urandom", 9, 1}, {"tty", 0, 5},
};

static int put_dir(int root, const char *path, mode_t mode)
{
    char leaf[256];
    cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
    if (dir < 0)
        return -1;
    /* No chmod, for which the umask is 0: below a writable bind a job may have put a link there since. */
    if (mkdirat(dir, leaf, mode) == 0)
        return 0;
    struct stat st;
    if (errno != EEXIST || fstatat(dir, leaf, &st, AT_SYMLINK_NOFOLLOW) < 0)
        return -1;
    errno = ENOTDIR;
    return S_ISDIR(st.st_mode) ? 0 : -1;
}

static int put_link(int root, const char *path, const char *target)
{
    char leaf[256];
    cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
    return dir < 0 ? -1 : symlinkat(target, dir, leaf);
}

/* Grafts a detached mount at `path`, which is made as a directory or an empty file if it is not
 * there. By descriptors only: no path is walked twice. */
static int graft(int root, int tree, const char *path)
{
    char leaf[256];
    struct stat st;
    cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
    if (dir < 0 || fstat(tree, &st) < 0)
        return -1;
    int there = is_there(dir, leaf);
    if (there < 0)
        return -1;
    if (!there) {
        if (S_ISDIR(st.st_mode)) {
            if (mkdirat(dir, leaf, 0755) < 0)
                return -1;
        } else {
            int fd = openat(dir, leaf, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
            if (fd < 0)
                return -1;
            close(fd);
        }
    }
    cleanup_close int target = openat(dir, leaf, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    struct stat at;
    if (target < 0 || fstat(target, &at) < 0)
        return -1;
    if (check_kinds(st.st_mode, at.st_mode) < 0)
        return -1;
    return sys_move_mount(tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

/* Only adding flags with AT_RECURSIVE works without knowing the (possibly locked) old ones, also in
 * a user namespace; MS_REMOUNT would be EPERM there. */
static int clone_tree(int at, const char *source, uint64_t resolve, uint64_t attributes)
{
    cleanup_close int from = sys_openat2(at, source, O_PATH | O_CLOEXEC, 0, resolve);
    if (from < 0)
        return -1;
    cleanup_close int tree =
        sys_open_tree(from, "", AT_EMPTY_PATH | AT_RECURSIVE | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    if (tree < 0)
        return -1;
    if (sys_mount_setattr(tree, "", AT_EMPTY_PATH | AT_RECURSIVE, attributes) < 0)
        return -1;
    return steal_fd(&tree);
}

/* A job must see neither the host's processes nor files that change its own limits, whatever links
 * led there. */
static bool is_dangerous(const char *type)
{
    return !strcmp(type, "proc") || !strcmp(type, "cgroup") || !strcmp(type, "cgroup2");
}

static int check_source(int tree)
{
    struct statfs fs;
    if (fstatfs(tree, &fs) < 0)
        return -1;
    if (fs.f_type == PROC_SUPER_MAGIC || fs.f_type == CGROUP_SUPER_MAGIC ||
        fs.f_type == CGROUP2_SUPER_MAGIC) {
        errno = EXDEV;
        return -1;
    }
    return 0;
}

/* Binds are recursive: what was mounted below a source came with it. At /proc each cell mounts its own
 * over what is there. mountinfo: ID PARENT DEVICE ROOT TARGET OPTIONS... - TYPE SOURCE OPTIONS */
static int check_mounts(struct failure *f)
{
    char line[8192], target[4096], type[64];
    FILE *mounts = fopen("/proc/self/mountinfo", "re");
    if (!mounts)
        return fail(f, "read mountinfo");
    int result = 0;
    while (result == 0 && fgets(line, sizeof(line), mounts)) {
        const char *end = strstr(line, " - ");
        if (!end || sscanf(line, "%*s %*s %*s %*s %4095s", target) != 1 ||
            sscanf(end, " - %63s", type) != 1) {
            errno = EBADMSG;
            result = fail(f, "read mountinfo");
        } else if (is_dangerous(type) && strcmp(target, "/proc") && strncmp(target, "/proc/", 6)) {
            errno = EXDEV;
            result = fail_at(f, "dangerous mount", target);
        }
    }
    if (result == 0 && ferror(mounts))
        result = fail(f, "read mountinfo");
    fclose(mounts);
    return result;
}

#define LAYER_ATTRIBUTES (MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_RDONLY)

/* The layers since the last overlay, the highest first. */
static int layers[MAX_LOWER];
static unsigned nlayers;
static const char *merged; /* where the overlay is, while the root is built */

#define IMAGES "dev/.images"

/* Before 6.15 overlayfs takes no mount that is attached nowhere. */
static int attach_image(const struct config *c, int root, unsigned number)
{
    char path[32];
    snprintf(path, sizeof(path), IMAGES "/%u", number);
    if (number >= c->nimages) {
        errno = EBADMSG;
        return -1;
    }
    return graft(root, c->images[number], path) < 0 ? -1
                                                    : fcntl(c->images[number], F_DUPFD_CLOEXEC, 3);
}

/* What was made of them holds them. */
static int detach_images(struct config *c, int root)
{
    char path[32];
    if (fchdir(root) < 0)
        return -1;
    for (unsigned i = 0; i < c->nimages; i++) {
        snprintf(path, sizeof(path), IMAGES "/%u", i);
        if (umount2(path, MNT_DETACH) < 0 || rmdir(path) < 0)
            return -1;
        close_fd(&c->images[i]);
    }
    return c->nimages > 0 ? rmdir(IMAGES) : 0;
}

static int add_layer(const struct config *c, int root, int host, const struct field *op,
                     const char *source)
{
    int layer = op->index > 0
                    ? attach_image(c, root, op->index - 1U)
                    : sys_openat2(host, source, O_PATH | O_DIRECTORY | O_CLOEXEC, 0, HOSTS);
    if (layer < 0 || check_source(layer) < 0)
        return -1;
    if (nlayers == ARRAY_LEN(layers)) {
        errno = E2BIG;
        return -1;
    }
    layers[nlayers++] = layer;
    return 0;
}

/* Named by descriptors: a path would need escaping, and could be another one by then. An empty lowest
 * layer, since overlayfs wants two where none is writable. */
static int put_overlay(const struct config *c, int root, const char *path)
{
    char options[2048], target[32], leaf[256];
    merged = path;
    size_t n = (size_t)snprintf(options, sizeof(options), "lowerdir=");
    for (unsigned i = 0; i < nlayers; i++)
        n += (size_t)snprintf(options + n, sizeof(options) - n, "/proc/self/fd/%d:", layers[i]);
    snprintf(options + n, sizeof(options) - n, "/dev/.empty%s",
             c->mode == IDS_ROOT ? "" : ",userxattr");
    if (put_dir(root, path, 0755) < 0)
        return -1;
    cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
    cleanup_close int fd = dir < 0 ? -1 : openat(dir, leaf, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0)
        return -1;
    snprintf(target, sizeof(target), "/proc/self/fd/%d", fd);
    int result = mount("isojob", target, "overlay", MS_RDONLY | MS_NOSUID | MS_NODEV, options);
    while (nlayers > 0)
        close_fd(&layers[--nlayers]);
    return result;
}

/* Not recursive: an overlay shows no mounts below its layers. */
static int put_lower(int root, const char *path)
{
    char target[256];
    for (unsigned i = 0; i < nlayers; i++) {
        snprintf(target, sizeof(target), "%s/%u", path, i);
        cleanup_close int tree =
            sys_open_tree(layers[i], "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
        if (tree < 0 || sys_mount_setattr(tree, "", AT_EMPTY_PATH, LAYER_ATTRIBUTES) < 0 ||
            graft(root, tree, target) < 0)
            return -1;
        close_fd(&layers[i]);
    }
    nlayers = 0;
    return 0;
}

static int put_node(const struct config *c, int root, int host, const char *name)
{
    for (size_t i = 0; i < ARRAY_LEN(nodes); i++) {
        if (strcmp(nodes[i].name, name))
            continue;
        char path[32], leaf[256];
        snprintf(path, sizeof(path), "dev/%s", name);
        if (c->mode == IDS_ROOT) {
            cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
            if (dir < 0)
                return -1;
            if (mknodat(dir, leaf, S_IFCHR | 0666, makedev(nodes[i].major, nodes[i].minor)) == 0)
                return 0;
            if (errno != EPERM)
                return -1;
        }
        /* mknod is EPERM in a user namespace (and without CAP_MKNOD): bind the host's node. */
        cleanup_close int tree =
            clone_tree(host, path, HOSTS, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC);
        return tree < 0 ? -1 : graft(root, tree, path);
    }
    errno = EINVAL;
    return -1;
}

static int apply(const struct config *c, const struct field *op, int root, int host,
                 struct failure *f)
{
    const char *path, *other;
    const uint8_t *data;
    size_t len;
    errno = EBADMSG;
    switch (op->tag) {
    case TAG_ROOT_DIR:
        path = wire_string(op);
        return path && put_dir(root, path, op->index) == 0 ? 0 : fail_at(f, "mkdir", path);
    case TAG_ROOT_LINK:
        if (!wire_pair(op, &path, &other))
            return fail(f, "configuration");
        return put_link(root, path, other) == 0 ? 0 : fail_at(f, "symlink", path);
    case TAG_ROOT_FILE:
        if (!wire_path_bytes(op, &path, &data, &len))
            return fail(f, "configuration");
        return put_file(root, path, data, len, op->index) == 0 ? 0 : fail_at(f, "write", path);
    case TAG_ROOT_LAYER:
        path = wire_string(op);
        return path && add_layer(c, root, host, op, path) == 0 ? 0 : fail_at(f, "layer", path);
    case TAG_ROOT_OVERLAY:
        path = wire_string(op);
        return path && put_overlay(c, root, path) == 0 ? 0 : fail(f, "overlay of the layers");
    case TAG_ROOT_LOWER:
        path = wire_string(op);
        return path && put_lower(root, path) == 0 ? 0 : fail(f, "bind of the layers");
    case TAG_ROOT_NODE:
        path = wire_string(op);
        return path && put_node(c, root, host, path) == 0 ? 0 : fail_at(f, "device node", path);
    case TAG_ROOT_BIND:
    case TAG_ROOT_COPY: {
        if (!wire_pair(op, &path, &other))
            return fail(f, "configuration");
        if (op->tag == TAG_ROOT_COPY && copy_tree(host, other, root, path) == 0)
            return 0;
        uint64_t attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV;
        if (!(op->index & BIND_WRITABLE))
            attributes |= MOUNT_ATTR_RDONLY;
        cleanup_close int tree = op->index & BIND_OWN ? clone_tree(root, other, OURS, attributes)
                                                      : clone_tree(host, other, HOSTS, attributes);
        if (tree < 0)
            return (op->index & BIND_OPTIONAL) && errno == ENOENT
                       ? 0
                       : fail_at(f, "bind source", other);
        if (check_source(tree) < 0)
            return fail_at(f, "dangerous mount", path);
        return graft(root, tree, path) == 0 ? 0 : fail_at(f, "mount target", path);
    }
    default:
        return fail(f, "configuration");
    }
}

/* A cell may mount its own proc only while the template shows a full one (mount_too_revealing): a
 * fresh instance where we may, for a container's proc is covered by masks; else the host's. */
static int put_proc(int root, int host, struct failure *f)
{
    if (put_dir(root, "proc", 0555) < 0)
        return fail(f, "mkdir proc");
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) == 0)
        return 0;
    /* Not read-only: a cell's own could then not be mounted writable, and it has to be for a moment. */
    cleanup_close int tree =
        clone_tree(host, "proc", HOSTS, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
    return tree < 0 || graft(root, tree, "proc") < 0 ? fail(f, "proc of the template") : 0;
}

int root_build(struct config *c, struct reader plan, struct failure *f)
{
    struct field op;
    int more;
    cleanup_close int host = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        return fail(f, "make mounts private");
    if (mount("isojob", "/proc", "tmpfs", MS_NOSUID, "mode=755,size=16m,nr_inodes=4096") < 0)
        return fail(f, "mount root tmpfs");
    cleanup_close int root = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (host < 0 || root < 0 || fchdir(root) < 0)
        return fail(f, "open root");
    if (sys_pivot_root(".", ".") < 0)
        return fail(f, "pivot_root");
    if (put_proc(root, host, f) < 0)
        return -1;
    while ((more = wire_next(&plan, &op)) > 0)
        if (apply(c, &op, root, host, f) < 0)
            return -1;
    if (more < 0) {
        errno = EBADMSG;
        return fail(f, "configuration");
    }
    /* What it shows is bound elsewhere by now: one mount less for each cell to copy. */
    if (merged && (fchdir(root) < 0 || umount2(merged, MNT_DETACH) < 0 || rmdir(merged) < 0))
        return fail_at(f, "unmount", merged);
    if (detach_images(c, root) < 0)
        return fail(f, "detach images");
    close_fd(&host);
    if (fchdir(root) < 0 || umount2(".", MNT_DETACH) < 0)
        return fail(f, "detach the host's root");
    if (sys_mount_setattr(root, "", AT_EMPTY_PATH, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID) < 0)
        return fail(f, "read-only root");
    if (check_mounts(f) < 0)
        return -1;
    char cwd[16];
    if (!getcwd(cwd, sizeof(cwd)))
        return fail(f, "root check");
    if (strcmp(cwd, "/")) {
        errno = EXDEV;
        return fail(f, "root check");
    }
    return 0;
}
