/* Chunks of work for a few threads, on a machine that others use too.

   The caller works itself; helpers take chunks as they come. A helper that is not scheduled costs nothing: only chunks
   that it has taken are waited for. (OpenMP's barrier waits for every thread: beside one busy process a step of a
   millisecond then takes ten.) One job at a time; a second caller works alone.

   A step may be hundreds of short jobs, one behind the other, so that a job takes no lock and no call of the system
   while helpers are awake: a helper that finds a chunk in `ticket` takes it, whatever job it belongs to. */

#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <unistd.h>

#define POOL_MOST 64
#define POOL_SPINS 20000 /* some hundred microseconds: about the pause between two steps */

#if defined(__x86_64__) || defined(__i386__)
#define POOL_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define POOL_PAUSE() __asm__ volatile("yield")
#else
#define POOL_PAUSE() ((void)0)
#endif

static struct {
  pthread_mutex_t lock, busy;
  pthread_cond_t wake;
  pid_t owner; /* threads do not survive a fork */
  int helpers;
  Chunk chunk; /* of the job whose chunks are in `ticket`; who holds a chunk may read it, and keeps the job alive */
  void *job;
  _Alignas(64) _Atomic uint64_t ticket; /* next chunk << 32 | chunks of the job */
  _Alignas(64) atomic_int done;         /* chunks of the job that are finished */
  _Alignas(64) atomic_int sleeping, wanted;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .busy = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static int pool_open(uint64_t ticket) { return ticket >> 32 < (uint32_t)ticket; }

/* Does the next chunk that nobody has taken; 0 where there is none. */
static int pool_work(void) {
  uint64_t ticket = atomic_load(&pool.ticket);
  while (pool_open(ticket))
    if (atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + (1ull << 32))) {
      pool.chunk(pool.job, (int)(ticket >> 32));
      atomic_fetch_add(&pool.done, 1); /* from here on the caller may go on */
      return 1;
    }
  return 0;
}

static void *pool_helper(void *number) {
  const int index = (int)(intptr_t)number;
  for (;;) {
    for (int spin = 0; spin < POOL_SPINS; spin++)
      if (index < atomic_load(&pool.wanted) && pool_work())
        spin = 0;
      else
        POOL_PAUSE();
    pthread_mutex_lock(&pool.lock);
    atomic_fetch_add(&pool.sleeping, 1); /* before the last look: who opens a job looks here afterwards */
    while (index >= atomic_load(&pool.wanted) || !pool_open(atomic_load(&pool.ticket)))
      pthread_cond_wait(&pool.wake, &pool.lock);
    atomic_fetch_sub(&pool.sleeping, 1);
    pthread_mutex_unlock(&pool.lock);
  }
  return NULL;
}

/* Helpers for `threads` threads, as far as they can be had. */
static void pool_grow(int threads) {
  if (pool.owner != getpid()) {
    pool.owner = getpid();
    pool.helpers = 0;
    atomic_store(&pool.ticket, 0);
    atomic_store(&pool.sleeping, 0);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
  }
  while (pool.helpers < threads - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, pool_helper, (void *)(intptr_t)pool.helpers)) break;
    pthread_detach(thread);
    pool.helpers++;
  }
}

/* chunk(job, 0) ... chunk(job, chunks - 1), on at most `threads` threads, this one included */
void gn_pool_run(Chunk chunk, void *job, int chunks, int threads) {
  if (threads > POOL_MOST) threads = POOL_MOST;
  if (threads <= 1 || chunks <= 1 || pthread_mutex_trylock(&pool.busy)) {
    for (int c = 0; c < chunks; c++) chunk(job, c);
    return;
  }
  pool_grow(threads);
  pool.chunk = chunk, pool.job = job;
  atomic_store(&pool.done, 0);
  atomic_store(&pool.wanted, threads - 1);
  atomic_store(&pool.ticket, (uint64_t)chunks);
  if (atomic_load(&pool.sleeping)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
  }
  while (pool_work()) {
  }
  for (int spin = 0; atomic_load(&pool.done) < chunks; spin++)
    if (spin < POOL_SPINS)
      POOL_PAUSE();
    else
      sched_yield();
  pthread_mutex_unlock(&pool.busy);
}
