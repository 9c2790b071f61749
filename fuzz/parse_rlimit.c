/* The launcher's reading of resource limits. None is set: they would be the fuzzer's own. */
#include "../isojob/native/zygote.h"

#include <sys/resource.h>

#include "targets.h"

enum { HARD = 1000 }; /* the caller's own */

static int get(__rlimit_resource_t resource, struct rlimit *limit)
{
    (void)resource;
    *limit = (struct rlimit){.rlim_cur = HARD, .rlim_max = HARD};
    return 0;
}

static int set(__rlimit_resource_t resource, const struct rlimit *limit)
{
    (void)resource;
    errno = limit->rlim_cur > limit->rlim_max ? EINVAL : EPERM;
    return limit->rlim_max > HARD || limit->rlim_cur > limit->rlim_max ? -1 : 0;
}

#define getrlimit get
#define setrlimit set
#include "../isojob/native/rlimit.c"

int fuzz_rlimits(const uint8_t *data, size_t size)
{
    struct failure f = {0};
    struct reader r = {.at = data, .end = data + size};
    /* A limit that is too high is lowered to what may be had, and never refused for that. */
    if (set_rlimits(r, (uint64_t)size << 32, &f) < 0 && f.error == EPERM)
        abort();
    return f.error;
}
