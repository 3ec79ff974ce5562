/* Chunks of work for a few threads. One pool (`pool.c`) for a process: helpers of several would spin on the same cores. */

#ifndef GN_POOL
#define GN_POOL

typedef void (*Chunk)(void *job, int chunk);
typedef void (*PoolRun)(Chunk chunk, void *job, int chunks, int threads);

static void pool_alone(Chunk chunk, void *job, int chunks, int threads) {
  (void)threads;
  for (int c = 0; c < chunks; c++) chunk(job, c);
}

/* chunk(job, 0) ... chunk(job, chunks - 1), on at most `threads` threads, this one included */
static PoolRun pool_run = pool_alone;

void gn_use_pool(PoolRun run) { pool_run = run; }
#endif
