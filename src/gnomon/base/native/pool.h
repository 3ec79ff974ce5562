/* Chunks of work for a few threads, on a machine that others use too.

   The caller works itself; helpers take chunks as they come. A helper that is not scheduled costs nothing: only chunks
   that it has taken are waited for. (OpenMP's barrier waits for every thread: beside one busy process a step of a
   millisecond then takes ten.) One job at a time; a second caller works alone. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <unistd.h>

#define POOL_MOST 64
#define POOL_SPINS 20000 /* some tens of microseconds: about the pause between two steps */

#if defined(__x86_64__) || defined(__i386__)
#define POOL_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define POOL_PAUSE() __asm__ volatile("yield")
#else
#define POOL_PAUSE() ((void)0)
#endif

typedef void (*Chunk)(void *job, int chunk);

static struct {
  pthread_mutex_t lock, busy;
  pthread_cond_t wake;
  pid_t owner; /* threads do not survive a fork */
  int helpers, open, chunks, wanted;
  Chunk chunk;
  void *job;
  atomic_int next, active, serial, sleeping;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .busy = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static void pool_work(Chunk chunk, void *job, int chunks) {
  for (int c = atomic_fetch_add(&pool.next, 1); c < chunks; c = atomic_fetch_add(&pool.next, 1)) chunk(job, c);
}

static void *pool_helper(void *unused) {
  (void)unused;
  int seen = 0;
  for (;;) {
    for (int spin = 0; spin < POOL_SPINS && atomic_load(&pool.serial) == seen; spin++) POOL_PAUSE();
    pthread_mutex_lock(&pool.lock);
    while (pool.serial == seen) {
      atomic_fetch_add(&pool.sleeping, 1);
      pthread_cond_wait(&pool.wake, &pool.lock);
      atomic_fetch_sub(&pool.sleeping, 1);
    }
    seen = pool.serial;
    const int join = pool.open && pool.wanted > 0 && atomic_load(&pool.next) < pool.chunks;
    const Chunk chunk = pool.chunk;
    void *job = pool.job;
    const int chunks = pool.chunks;
    if (join) {
      pool.wanted--;
      atomic_fetch_add(&pool.active, 1);
    }
    pthread_mutex_unlock(&pool.lock);
    if (join) {
      pool_work(chunk, job, chunks);
      atomic_fetch_sub(&pool.active, 1);
    }
  }
  return NULL;
}

/* chunk(job, 0) ... chunk(job, chunks - 1), on at most `threads` threads, this one included */
static void pool_run(Chunk chunk, void *job, int chunks, int threads) {
  if (threads > POOL_MOST) threads = POOL_MOST;
  if (threads <= 1 || chunks <= 1 || pthread_mutex_trylock(&pool.busy)) {
    for (int c = 0; c < chunks; c++) chunk(job, c);
    return;
  }
  if (pool.owner != getpid()) {
    pool.owner = getpid();
    pool.helpers = 0;
    atomic_store(&pool.active, 0);
    atomic_store(&pool.sleeping, 0);
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.wake, NULL);
  }
  while (pool.helpers < threads - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, pool_helper, NULL)) break;
    pthread_detach(thread);
    pool.helpers++;
  }
  pthread_mutex_lock(&pool.lock);
  pool.chunk = chunk, pool.job = job, pool.chunks = chunks, pool.open = 1, pool.wanted = threads - 1;
  atomic_store(&pool.next, 0);
  atomic_fetch_add(&pool.serial, 1);
  if (atomic_load(&pool.sleeping)) pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
  pool_work(chunk, job, chunks);
  pthread_mutex_lock(&pool.lock);
  pool.open = 0; /* nobody joins any more */
  pthread_mutex_unlock(&pool.lock);
  for (int spin = 0; atomic_load(&pool.active); spin++)
    if (spin < POOL_SPINS)
      POOL_PAUSE();
    else
      sched_yield();
  pthread_mutex_unlock(&pool.busy);
}
