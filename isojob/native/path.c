/* Paths that others named, walked one component at a time by descriptors: never through a link. */
#include <sys/stat.h>

#include "zygote.h"

int is_there(int dir, const char *leaf)
{
    if (faccessat(dir, leaf, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return 1;
    return errno == ENOENT ? 0 : -1;
}

int check_kinds(mode_t source, mode_t target)
{
    errno = S_ISLNK(target) ? ELOOP : S_ISDIR(target) ? EISDIR : ENOTDIR;
    return !S_ISLNK(target) && S_ISDIR(source) == S_ISDIR(target) ? 0 : -1;
}

int open_parent(int root, const char *path, char *leaf, size_t size)
{
    cleanup_close int dir = fcntl(root, F_DUPFD_CLOEXEC, 3);
    while (dir >= 0) {
        while (*path == '/')
            path++;
        size_t len = strcspn(path, "/");
        if (len == 0 || len >= size || (len == 2 && !memcmp(path, "..", 2)) ||
            (len == 1 && *path == '.')) {
            errno = EINVAL;
            return -1;
        }
        memcpy(leaf, path, len);
        leaf[len] = 0;
        path += len;
        if (path[strspn(path, "/")] == 0)
            return steal_fd(&dir);
        if (mkdirat(dir, leaf, 0755) < 0 && errno != EEXIST)
            return -1;
        int next = openat(dir, leaf, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        close_fd(&dir);
        dir = next;
    }
    return -1;
}

int put_file(int root, const char *path, const void *data, size_t len, mode_t mode)
{
    char leaf[256];
    cleanup_close int dir = open_parent(root, path, leaf, sizeof(leaf));
    if (dir < 0)
        return -1;
    /* Instead of what an earlier job of the session left there: a FIFO, a link, another name of a
     * file. */
    if (unlinkat(dir, leaf, 0) < 0 && errno != ENOENT)
        return -1;
    cleanup_close int fd =
        openat(dir, leaf, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
    if (fd < 0)
        return -1;
    if (write_all(fd, data, len) < 0 || fchmod(fd, mode) < 0) {
        /* Half a file would be taken for a whole one by the next job of the session. */
        int error = errno;
        unlinkat(dir, leaf, 0);
        errno = error;
        return -1;
    }
    return 0;
}

int put_files(struct reader r, struct failure *f)
{
    struct field fl;
    cleanup_close int here = -1;
    while (wire_next(&r, &fl) > 0) {
        const char *path;
        const uint8_t *data;
        size_t len;
        if (fl.tag != TAG_PUT)
            continue;
        if (here < 0 && (here = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC)) < 0)
            return fail(f, "files");
        if (!wire_path_bytes(&fl, &path, &data, &len)) {
            errno = EBADMSG;
            return fail(f, "files");
        }
        if (put_file(here, path, data, len, fl.index & 0777) < 0)
            return fail_at(f, "write file", path);
    }
    return 0;
}
