/* init's reading of the numbers in cgroup files, and of what the host wants written to them. */
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
    for (size_t i = 0; i < ARRAY_LEN(counters); i++)
        if (find_number(text, &counters[i]) < -1)
            abort();
    free(text);
    return 0;
}

int fuzz_writes(const uint8_t *data, size_t size)
{
    struct reader r = {.at = data, .end = data + size};
    struct field fl;
    struct cg_file file;
    const uint8_t *content;
    size_t len;
    while (wire_next(&r, &fl) > 0) {
        if (!take_write(&fl, &file, &content, &len))
            continue;
        if (strchr(file.name, '/') || file.hier >= MAX_HIERARCHIES ||
            content + len != fl.data + fl.length)
            abort();
    }
    return 0;
}
