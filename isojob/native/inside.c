/* What init mounts and switches off in its own namespaces, before the job exists. The job's launcher
 * waits meanwhile. Everything here is on a copy of the template that only this cell sees. */
#include <stdio.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include "zygote.h"

#define SAFE (MS_NOSUID | MS_NODEV)

/* By the zygote, whose own proc has its entries in the dentry cache, for each cell anew: a module may
 * add one at any time, or take it away. What is open to its owner alone needs no mask: that is the
 * host's root, whom no cell maps (and whose group it may have). */
int masks_refresh(struct config *c, struct failure *f)
{
    for (unsigned i = 0; i < c->nmasks; i++) {
        struct mask *m = &c->masks[i];
        struct stat st;
        m->cover = NULL;
        if (lstat(m->path, &st) < 0) {
            /* What we may not reach, nobody in a cell may. */
            if (errno != ENOENT && errno != EACCES)
                return fail_at(f, "mask", m->path);
        } else if (st.st_mode & 0077)
            m->cover = S_ISDIR(st.st_mode) ? "/dev/.empty" : "/dev/null";
    }
    return 0;
}

/* hidepid=2: init, of another uid or not dumpable, is ENOENT to the job. Read-only as a whole: no
 * sysctl, sysrq-trigger, oom_score_adj or uid_map can be opened for writing, whoever owns it. */
static int mount_proc(const struct cell *cell, struct failure *f)
{
    char self[16] = "";
    const struct config *c = cell->config;
    if (mount("proc", "/proc", "proc", SAFE | MS_NOEXEC, "hidepid=2") < 0)
        return fail(f, "mount /proc");
    /* Were the outer proc to show through, /proc/self would not be pid 1. */
    if (readlink("/proc/self", self, sizeof(self) - 1) < 0)
        return fail(f, "check /proc");
    if (strcmp(self, "1")) {
        errno = EXDEV;
        return fail(f, "check /proc");
    }
    cleanup_close int fd = open("/proc/sys/user/max_user_namespaces", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write_all(fd, "0", 1) < 0)
        return fail(f, "max_user_namespaces");
    close_fd(&fd); /* a writer makes the read-only remount EBUSY */
    for (unsigned i = 0; i < c->nmasks; i++)
        if (c->masks[i].cover &&
            mount(c->masks[i].cover, c->masks[i].path, NULL, MS_BIND, NULL) < 0)
            return fail_at(f, "mask", c->masks[i].path);
    if (mount(NULL, "/proc", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | SAFE | MS_NOEXEC, NULL) < 0)
        return fail(f, "read-only /proc");
    return 0;
}

int make_dir(const struct config *c, const char *name, mode_t mode)
{
    if (mkdir(name, mode) < 0)
        return -1;
    return chown(name, c->job_uid, c->job_gid);
}

/* Below the cell's own tmpfs the target has to be made; nothing there is anybody else's yet. */
static int mount_one(const struct cell_mount *m)
{
    char leaf[256], path[32];
    struct stat at, st = {.st_mode = S_IFDIR};
    cleanup_close int root = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    cleanup_close int dir = root < 0 ? -1 : open_parent(root, m->path, leaf, sizeof(leaf));
    if (dir < 0 || (m->source && stat(m->source, &st) < 0))
        return -1;
    int there = is_there(dir, leaf);
    if (there < 0 || (!there && (S_ISDIR(st.st_mode) ? mkdirat(dir, leaf, 0755)
                                                     : mknodat(dir, leaf, S_IFREG | 0644, 0)) < 0))
        return -1;
    /* A writable bind of the caller may hold a link that an earlier job left there: never followed. */
    cleanup_close int target = openat(dir, leaf, O_PATH | O_NOFOLLOW | O_CLOEXEC);
    if (target < 0 || fstat(target, &at) < 0 || check_kinds(st.st_mode, at.st_mode) < 0)
        return -1;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", target);
    if (m->source)
        return mount(m->source, path, NULL, MS_BIND | MS_REC, NULL);
    return mount("isojob", path, "tmpfs", SAFE, m->options);
}

int inside_mounts(const struct config *c, struct failure *f)
{
    for (unsigned i = 0; i < c->nmounts; i++)
        if (mount_one(&c->mounts[i]) < 0)
            return fail_at(f, "mount target", c->mounts[i].path);
    return 0;
}

/* The session's directory is the lower layer, of which nothing is changed. */
static int mount_copy(const struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    if (make_dir(c, "/tmp/box", 0755) < 0 || mkdir("/tmp/work", 0700) < 0)
        return fail(f, "mkdir for the copy");
    /* By its relative name: a colon or comma in a path would need escaping. userxattr: the upper
     * layer's marks in a user namespace (5.11). */
    if (chdir(c->workdir) < 0 ||
        mount("isojob", c->workdir, "overlay", SAFE,
              "lowerdir=.,upperdir=/tmp/box,workdir=/tmp/work,userxattr") < 0)
        return fail_at(f, "overlay", c->workdir);
    return 0;
}

/* One tmpfs carries /tmp, /dev/shm and the working directory, unless a session has that: its size
 * and inodes are totals. */
static int mount_disk(struct cell *cell, struct failure *f)
{
    const struct config *c = cell->config;
    char options[96];
    snprintf(options, sizeof(options), "mode=755,size=%llu,nr_inodes=%llu",
             (unsigned long long)cell->disk, (unsigned long long)cell->inodes);
    if (mount("isojob", "/tmp", "tmpfs", SAFE, options) < 0)
        return fail(f, "mount /tmp");
    if (c->nlower && writable_enter(cell, f) < 0)
        return -1;
    if (make_dir(c, "/tmp/tmp", 01777) < 0 || make_dir(c, "/tmp/shm", 01777) < 0)
        return fail(f, "mkdir in /tmp");
    if (!cell->session && (make_dir(c, "/tmp/box", 0755) < 0 ||
                           mount("/tmp/box", c->workdir, NULL, MS_BIND, NULL) < 0))
        return fail_at(f, "bind", c->workdir);
    if (cell->private && mount_copy(cell, f) < 0)
        return -1;
    if (mount("/tmp/shm", "/dev/shm", NULL, MS_BIND, NULL) < 0)
        return fail(f, "mount /dev/shm");
    if (mount("/tmp/tmp", "/tmp", NULL, MS_BIND, NULL) < 0)
        return fail(f, "bind /tmp");
    if (chdir("/") < 0)
        return fail(f, "chdir /");
    return inside_mounts(c, f);
}

int inside_build(struct cell *cell, struct failure *f)
{
    umask(0);
    if (mount_proc(cell, f) < 0 || mount_disk(cell, f) < 0)
        return -1;
    umask(022);
    if (sethostname(cell->config->hostname, strlen(cell->config->hostname)) < 0)
        return fail(f, "sethostname");
    return 0;
}
