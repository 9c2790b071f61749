/* What parsers.c feeds; each in a file of its own, beside the static functions that it calls.
 *
 * A target aborts where a parser has taken what it should not have, or has given what was not said.
 * The working directory is its own to write to. */
#ifndef ISOJOB_FUZZ_TARGETS_H
#define ISOJOB_FUZZ_TARGETS_H

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

int fuzz_branch(const uint8_t *data, size_t size);
int fuzz_cell(const uint8_t *data, size_t size);
int fuzz_collect(const uint8_t *data, size_t size);
int fuzz_counters(const uint8_t *data, size_t size);
int fuzz_files(const uint8_t *data, size_t size);
int fuzz_job(const uint8_t *data, size_t size);
int fuzz_make(const uint8_t *data, size_t size);
int fuzz_mounts(const uint8_t *data, size_t size);
int fuzz_names(const uint8_t *data, size_t size);
int fuzz_plan(const uint8_t *data, size_t size);
int fuzz_rlimits(const uint8_t *data, size_t size);
int fuzz_session(const uint8_t *data, size_t size);
int fuzz_template(const uint8_t *data, size_t size);
int fuzz_writes(const uint8_t *data, size_t size);

#endif
