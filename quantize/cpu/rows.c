/* SPDX-License-Identifier: Apache-2.0
 *
 * Rows of a table on disk for one pass: those that the cache holds, and those that the system has
 * in memory. Twin and description: row_batch.py; the cache is that of row_cache.py, bit for bit. */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>

enum { PAGE = 4096 };

typedef struct {
    int64_t sets, ways, row_bytes;
    int64_t *keys, *used, *tick;
    uint8_t *rows;
    int64_t file, start, size, base, num_rows;
} Table;

typedef struct {
    int64_t id, at;
} Asked;

static int by_id(const void *left, const void *right) {
    const Asked *a = left, *b = right;
    if (a->id != b->id) return a->id < b->id ? -1 : 1;
    return a->at < b->at ? -1 : 1;
}

static int64_t first_way(const Table *table, int64_t key) {
    const uint64_t spread = ((uint64_t)key * UINT64_C(0x9E3779B97F4A7C15)) >> 32;
    return (int64_t)(spread % (uint64_t)table->sets) * table->ways;
}

static uint8_t *find(const Table *table, int64_t key, int64_t tick) {
    const int64_t first = first_way(table, key);
    for (int64_t way = first; way < first + table->ways; ++way)
        if (table->keys[way] == key) {
            if (tick) table->used[way] = tick;
            return table->rows + way * table->row_bytes;
        }
    return NULL;
}

/* Puts a row where the least recently used one of its set lies, unless that is of this tick. */
static void keep(const Table *table, int64_t key, const uint8_t *row, int64_t tick) {
    if (find(table, key, 0)) return;
    const int64_t first = first_way(table, key);
    int64_t oldest = first;
    for (int64_t way = first + 1; way < first + table->ways; ++way)
        if (table->used[way] < table->used[oldest]) oldest = way;
    if (table->used[oldest] == tick) return;
    table->keys[oldest] = key;
    table->used[oldest] = tick;
    memcpy(table->rows + oldest * table->row_bytes, row, (size_t)table->row_bytes);
}

static int read_ready(const Table *table, int64_t id, uint8_t *out) {
#ifdef RWF_NOWAIT
    const struct iovec into = {out, (size_t)table->size};
    const int64_t from = table->start + id * table->size;
    return preadv2((int)table->file, &into, 1, from, RWF_NOWAIT) == table->size;
#else
    return 0;
#endif
}

/* Fills rows `out` [count, row bytes] of ids [count] as far as nothing has to be waited for.
 *
 * `order` [count]: places of the ids as they ascend; `left` [count]: places still to be read, one
 * of each id; `told` [3]: distinct ids that the cache did not hold, pages that they begin in, and
 * how many are left. More misses than `tried` are left without a try. Gives 0, or 1 if an id is
 * no row of the table. */
int64_t dsv4_begin_rows(const Table *table, const int64_t *ids, int64_t count, int64_t tried,
                        uint8_t *out, int64_t *order, int64_t *left, int64_t *told) {
    Asked few[256], *const asked = count <= 256 ? few : malloc((size_t)count * sizeof *asked);
    if (!asked) return 2;
    for (int64_t i = 0; i < count; ++i) asked[i] = (Asked){ids[i], i};
    qsort(asked, (size_t)count, sizeof *asked, by_id);
    const int wrong =
        count && (asked[0].id < 0 || asked[count - 1].id >= table->num_rows);
    for (int64_t i = 0; i < count; ++i) order[i] = asked[i].at;
    if (asked != few) free(asked);
    if (wrong) return 1;

    const int64_t row = table->row_bytes, tick = ++*table->tick;
    int64_t missed = 0, pages = 0, end = -1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = order[i], id = ids[at];
        if (i && ids[order[i - 1]] == id) continue;
        const uint8_t *held = find(table, id + table->base, tick);
        if (held) {
            memcpy(out + at * row, held, (size_t)row);
            continue;
        }
        left[missed++] = at;
        const int64_t begin = table->start + id * table->size;
        pages += begin / PAGE != end;
        end = (begin + table->size - 1) / PAGE;
    }
    int64_t stay = missed;
    if (missed && missed <= tried) {
        stay = 0;
        const int64_t filled = ++*table->tick;
        for (int64_t i = 0; i < missed; ++i) {
            const int64_t at = left[i];
            if (read_ready(table, ids[at], out + at * row))
                keep(table, ids[at] + table->base, out + at * row, filled);
            else left[stay++] = at;
        }
    }
    /* Rows that are left are copied once they are read. */
    for (int64_t i = 1; i < count; ++i)
        if (ids[order[i]] == ids[order[i - 1]])
            memcpy(out + order[i] * row, out + order[i - 1] * row, (size_t)row);
    told[0] = missed, told[1] = pages, told[2] = stay;
    return 0;
}

/* Takes rows that were read to `left` [stay] up, and copies them to where else they are wanted. */
void dsv4_end_rows(const Table *table, const int64_t *ids, int64_t count, uint8_t *out,
                   const int64_t *order, const int64_t *left, int64_t stay) {
    const int64_t row = table->row_bytes, tick = ++*table->tick;
    for (int64_t i = 0; i < stay; ++i)
        keep(table, ids[left[i]] + table->base, out + left[i] * row, tick);
    for (int64_t i = 1; i < count; ++i)
        if (ids[order[i]] == ids[order[i - 1]])
            memcpy(out + order[i] * row, out + order[i - 1] * row, (size_t)row);
}
