/* Files and names that the host gives: those of the root's plan, those of a job; and the kernel's list
 * of mounts, in which paths are the host's. What is mounted is not tried here. */
#include "../isojob/native/zygote.h"

#include <ftw.h>
#include <stdio.h>
#include <sys/stat.h>

#include "targets.h"

static struct reader mountinfo;

static FILE *open_text(const char *path, const char *mode)
{
    (void)path, (void)mode;
    return fmemopen((void *)mountinfo.at, (size_t)(mountinfo.end - mountinfo.at), "r");
}

#define fopen open_text
#include "../isojob/native/root.c"

int fuzz_mounts(const uint8_t *data, size_t size)
{
    struct failure f = {0};
    mountinfo = (struct reader){.at = data, .end = data + size};
    return check_mounts(&f);
}

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *at)
{
    (void)st, (void)flag;
    return at->level ? remove(path) : 0;
}

/* An empty directory, but for a way out of it. */
static int directory(void)
{
    static int fd = -1;
    if (fd < 0) {
        mkdir("files", 0755); /* there already, if a merge goes on after a crash */
        mkdir("beside", 0755);
        fd = open("files", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
    if (fd < 0 || nftw("files", remove_one, 16, FTW_DEPTH | FTW_PHYS) < 0 ||
        symlinkat("../beside", fd, "out") < 0)
        abort();
    return fd;
}

static void check_beside(void)
{
    if (rmdir("beside") < 0 || mkdir("beside", 0755) < 0)
        abort();
}

int fuzz_plan(const uint8_t *data, size_t size)
{
    static const struct config config;
    int root = directory();
    struct reader r = {.at = data, .end = data + size};
    struct field op;
    struct failure f = {0};
    while (wire_next(&r, &op) > 0)
        if (op.tag == TAG_ROOT_DIR || op.tag == TAG_ROOT_LINK || op.tag == TAG_ROOT_FILE)
            apply(&config, &op, root, -1, &f);
    check_beside();
    return 0;
}

int fuzz_files(const uint8_t *data, size_t size)
{
    static int top = -1;
    struct reader r = {.at = data, .end = data + size};
    struct failure f = {0};
    if (top < 0)
        top = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fchdir(directory()) < 0)
        abort();
    int result = put_files(r, &f);
    if (fchdir(top) < 0)
        abort();
    check_beside();
    return result;
}
