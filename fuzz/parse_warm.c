/* A template's reading of a BRANCH message. */
#include "../isojob/native/warm/warm.c"

#include "targets.h"

/* The interpreter's. */
void PyOS_BeforeFork(void) {}
void PyOS_AfterFork_Parent(void) {}
void PyOS_AfterFork_Child(void) {}

int fuzz_names(const uint8_t *data, size_t size)
{
    struct warm_job job;
    struct reader r = {.at = data, .end = data + size};
    size_t n = 0, length = 0;
    names_of(r, &job);
    while (job.argv[n])
        length += strlen(job.argv[n++]);
    if (n >= MAX_TEMPLATE_STRINGS || length > size)
        abort();
    return 0;
}
