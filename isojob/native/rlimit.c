/* Resource limits of the launcher: those of every job while it is made, those of this job with it. */
#include <sys/resource.h>

#include "zygote.h"

int set_rlimit(const struct field *fl, uint64_t more, struct failure *f)
{
    uint64_t pair[2];
    struct rlimit limit, old;
    __rlimit_resource_t resource = (__rlimit_resource_t)fl->index;
    if (fl->length != sizeof(pair)) {
        errno = EBADMSG;
        return fail(f, "rlimit");
    }
    memcpy(pair, fl->data, sizeof(pair));
    limit = (struct rlimit){.rlim_cur = pair[0], .rlim_max = pair[1]};
    if (resource == RLIMIT_AS && pair[0] <= pair[1] && pair[1] < RLIM_INFINITY - more) {
        limit.rlim_cur += more;
        limit.rlim_max += more;
    }
    if (setrlimit(resource, &limit) == 0)
        return 0;
    /* A hard limit of the caller lower than ours stays in force: it is only stricter. */
    if (errno != EPERM || getrlimit(resource, &old) < 0)
        return fail(f, "rlimit");
    if (limit.rlim_cur > old.rlim_max)
        limit.rlim_cur = old.rlim_max;
    limit.rlim_max = old.rlim_max;
    return setrlimit(resource, &limit) < 0 ? fail(f, "rlimit") : 0;
}

int set_rlimits(struct reader r, uint64_t more, struct failure *f)
{
    struct field fl;
    while (wire_next(&r, &fl) > 0)
        if (fl.tag == TAG_RLIMIT && set_rlimit(&fl, more, f) < 0)
            return -1;
    return 0;
}
