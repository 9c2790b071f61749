/* The launcher's reading of a JOB message, which is static there. */
#include "../isojob/native/job.c"

#include "targets.h"

int fuzz_job(const uint8_t *data, size_t size)
{
    static struct shared shared;
    static struct config config = {.nlimits = 2,
                                   .limits = {{.name = "memory.max"}, {.name = "pids.max"}}};
    struct cell cell = {.config = &config, .shared = &shared, .limit_fd = {-1, -1}};
    struct failure f = {0};
    struct job job;
    struct reader r = {.at = data, .end = data + size};
    memset(&shared, 0, sizeof(shared));
    int result = parse(&cell, &job, r, &f);
    if (result == 0) {
        size_t n = 0;
        for (char **word = job.argv; *word; word++)
            n += strlen(*word);
        for (char **word = job.envp; *word; word++)
            n += strlen(*word);
        n += strlen(job.path) + (job.cwd ? strlen(job.cwd) : 0);
        (void)n;
        if (job.envp - job.argv - 1 + 2 > 256)
            free(job.argv);
    }
    return result;
}
