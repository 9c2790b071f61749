/* What parsers.c feeds; each in a file of its own, beside the static function that it calls. */
#ifndef ISOJOB_FUZZ_TARGETS_H
#define ISOJOB_FUZZ_TARGETS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

int fuzz_job(const uint8_t *data, size_t size);
int fuzz_make(const uint8_t *data, size_t size);
int fuzz_counters(const uint8_t *data, size_t size);

#endif
