/* init's reading of the numbers in cgroup files. */
#include "../isojob/native/cgroup.c"

#include "targets.h"

int fuzz_counters(const uint8_t *data, size_t size)
{
    static const struct counter counters[] = {
        {.line = "", .mark = ""},
        {.line = "oom_kill ", .mark = ""},
        {.line = "some ", .mark = "total="},
    };
    char *text = strndup((const char *)data, size);
    if (!text)
        return -1;
    int64_t sum = 0;
    for (size_t i = 0; i < ARRAY_LEN(counters); i++)
        sum ^= find_number(text, &counters[i]);
    free(text);
    return sum == 0;
}
