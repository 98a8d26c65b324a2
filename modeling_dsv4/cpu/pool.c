/* SPDX-License-Identifier: Apache-2.0
 *
 * A call is a number of chunks that whoever is awake takes one by one, so that a thread that the
 * system does not run delays nobody. Everything that a taker must see at once lies in one word,
 * the ticket: which call it is, how many chunks it has, and which comes next. A chunk is taken by
 * adding one to it; that fails if the call is over, and until all chunks are done no other begins.
 *
 * Where the program's own OpenMP is known (`dsv4_adopt`), its threads take the chunks: those of a
 * second pool would wait for a core on which the first one's still spin.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <time.h>

enum { MOST_WORKERS = 255, FIELD = 18, SPIN_NANOSECONDS = 50000 };
#define FIELD_MASK ((UINT64_C(1) << FIELD) - 1)

static struct {
    pthread_mutex_t caller, lock;
    pthread_cond_t wake;
    pthread_t workers[MOST_WORKERS];
    int count, sleeping, guarded;
    _Atomic uint64_t ticket;
    _Atomic(Task) task;
    _Atomic(void *) argument;
    _Atomic int64_t done;
    _Atomic int members, stop;
} pool = {.caller = PTHREAD_MUTEX_INITIALIZER,
          .lock = PTHREAD_MUTEX_INITIALIZER,
          .wake = PTHREAD_COND_INITIALIZER};

/* libgomp's `GOMP_parallel`: calls work(argument) on so many threads, this one among them. */
typedef void (*Parallel)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);
static Parallel parallel;

typedef struct {
    Task task;
    void *argument;
    int64_t chunks;
    _Atomic int64_t next;
} Shared;

static void take_shared(void *argument) {
    Shared *s = argument;
    for (int64_t chunk; (chunk = atomic_fetch_add(&s->next, 1)) < s->chunks;)
        s->task(s->argument, chunk);
}

static inline void pause_briefly(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static inline uint64_t call_of(uint64_t ticket) { return ticket >> 2 * FIELD; }

static void take_chunks(void) {
    uint64_t ticket = atomic_load(&pool.ticket);
    for (;;) {
        const uint64_t next = ticket & FIELD_MASK;
        if (next >= (ticket >> FIELD & FIELD_MASK)) return;
        /* Read before the chunk is taken: they belong to this call if it can be taken. */
        const Task task = atomic_load(&pool.task);
        void *const argument = atomic_load(&pool.argument);
        if (!atomic_compare_exchange_strong(&pool.ticket, &ticket, ticket + 1)) continue;
        task(argument, (int64_t)next);
        atomic_fetch_add(&pool.done, 1);
        ticket = atomic_load(&pool.ticket);
    }
}

/* Waits for a call after `seen`; false if the process ends. */
static int wait_for_call(uint64_t seen) {
    const int64_t until = nanoseconds() + SPIN_NANOSECONDS;
    do {
        for (int i = 0; i < 32; ++i) {
            if (call_of(atomic_load(&pool.ticket)) != seen) return !atomic_load(&pool.stop);
            pause_briefly();
        }
    } while (nanoseconds() < until && !atomic_load(&pool.stop));
    pthread_mutex_lock(&pool.lock);
    ++pool.sleeping;
    while (call_of(atomic_load(&pool.ticket)) == seen && !atomic_load(&pool.stop))
        pthread_cond_wait(&pool.wake, &pool.lock);
    --pool.sleeping;
    pthread_mutex_unlock(&pool.lock);
    return !atomic_load(&pool.stop);
}

static void *worker(void *index) {
    uint64_t seen = ~UINT64_C(0);
    while (wait_for_call(seen)) {
        seen = call_of(atomic_load(&pool.ticket));
        if ((intptr_t)index < atomic_load(&pool.members)) take_chunks();
    }
    return NULL;
}

/* A forked process has none of the threads, and maybe a lock that one of them held. */
static void begin_anew(void) {
    pthread_mutex_init(&pool.caller, NULL);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
    pool.count = pool.sleeping = 0;
    /* libgomp waits for its lost threads for ever. */
    parallel = NULL;
    /* Chunks of a call that was under way are the parent's. */
    atomic_store(&pool.ticket, call_of(atomic_load(&pool.ticket)) << 2 * FIELD);
    atomic_store(&pool.stop, 0);
}

static void guard(void) {
    if (!pool.guarded) pool.guarded = !pthread_atfork(NULL, NULL, begin_anew);
}

/* Take the threads of an OpenMP that is in use here; NULL: own ones. */
void dsv4_adopt(Parallel found) {
    guard();
    parallel = pool.guarded ? found : NULL;
}

static void recruit(int wanted) {
    if (wanted > MOST_WORKERS) wanted = MOST_WORKERS;
    guard();
    if (pool.count >= wanted || !pool.guarded) return;
    /* Signals are for the threads of the program. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (; pool.count < wanted; ++pool.count) {
        void *const index = (void *)(intptr_t)pool.count;
        if (pthread_create(&pool.workers[pool.count], NULL, worker, index)) break;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static void wake_sleepers(void) {
    pthread_mutex_lock(&pool.lock);
    if (pool.sleeping) pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

void dsv4_share(Task task, void *argument, int64_t chunks, int64_t threads) {
    if (chunks > 1 && threads > 1 && parallel) {
        Shared shared = {task, argument, chunks, 0};
        parallel(take_shared, &shared, (unsigned)(threads < chunks ? threads : chunks), 0);
        return;
    }
    if (chunks < 2 || threads < 2 || (uint64_t)chunks > FIELD_MASK ||
        pthread_mutex_trylock(&pool.caller)) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) task(argument, chunk);
        return;
    }
    recruit((int)(threads > MOST_WORKERS ? MOST_WORKERS : threads - 1));
    atomic_store(&pool.task, task);
    atomic_store(&pool.argument, argument);
    atomic_store(&pool.done, 0);
    atomic_store(&pool.members, (int)threads - 1);
    const uint64_t call = call_of(atomic_load(&pool.ticket)) + 1;
    atomic_store(&pool.ticket, call << 2 * FIELD | (uint64_t)chunks << FIELD);
    wake_sleepers();
    take_chunks();
    for (int i = 0; atomic_load(&pool.done) < chunks; ++i) {
        if (i < 1000) pause_briefly();
        else sched_yield();
    }
    pthread_mutex_unlock(&pool.caller);
}

/* Workers alive in this process. */
int64_t dsv4_pool_size(void) { return pool.count; }

__attribute__((destructor)) static void dismiss(void) {
    atomic_store(&pool.stop, 1);
    wake_sleepers();
    for (int i = 0; i < pool.count; ++i) pthread_join(pool.workers[i], NULL);
    pool.count = 0;
}
