/* What a warm cell is made of, as its init and its launcher are sent it. */
#include "../isojob/native/handover.c"

#include "targets.h"

int fuzz_cell(const uint8_t *data, size_t size)
{
    static const struct config config;
    int packed[WIRE_MAX_FDS];
    unsigned nfds = size ? data[0] % (WIRE_MAX_FDS + 1) : 0, n;
    struct reader r = {.at = data + (size > 0), .end = data + size};
    struct cell cell;
    struct writer w;
    char buffer[8192];
    int *fds = malloc(nfds ? nfds * sizeof(int) : 1); /* of its exact size */
    if (!fds)
        abort();
    for (unsigned i = 0; i < nfds; i++)
        fds[i] = 1000 + (int)i; /* no descriptors: nothing is opened or closed here */
    cell_clear(&cell, &config);
    int result = take(&cell, &r, fds, nfds);
    /* Each has got one place, and none was made up. */
    wire_begin(&w, buffer, sizeof(buffer), MSG_CELL);
    if (result == 0 && (cell_pack(&cell, true, &w, packed, &n) < 0 || n != nfds ||
                        memcmp(packed, fds, n * sizeof(int))))
        abort();
    free(fds);
    return result;
}
