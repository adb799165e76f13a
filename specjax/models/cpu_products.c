// The product of a few rows with a large matrix on CPUs, `out = x @ w`, called through XLA's foreign function interface.
//
// A decoding step reads every weight once, for a few rows, and should take as long as memory takes to deliver them.
// XLA:CPU achieves that for one row of float32 only; for bfloat16, and for two to sixteen rows, it takes up to twice as
// long. Here every weight is read once, converted in a register, and multiplied with all rows. The order in which a
// result is summed depends neither on the number of rows nor on the number of threads, so that every row is, to the
// last bit, what it would be alone.
//
// bfloat16 matrices are [outputs, inputs] and float32 ones [inputs, outputs], as `linear.outputs_first` says.

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "xla/ffi/api/c_api.h"

#define INLINE static inline __attribute__((always_inline))

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#else
#define PAUSE() ((void)0)
#endif

enum {
  LANES = 16,         // 64 bytes: a cache line and an AVX-512 register, or several smaller registers
  BLOCK = 2 * LANES,  // bfloat16 weights of a cache line
  TILE = 4,           // outputs, and rows, whose sums are in registers at the same time
  DEPTH = 8,          // float32 inputs that are added to the sums of all rows at a time
  COLUMNS = 512,      // float32 outputs whose sums, for MAX_ROWS rows, fit into the first cache
  MAX_ROWS = 16,      // the largest of `cpu_products.MAX_ROWS`
};

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(4 * LANES / 4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));

INLINE floats load(const float *from) {
  floats vector;
  memcpy(&vector, from, sizeof vector);
  return vector;
}

INLINE float sum(floats vector) {
  quad parts[4];
  memcpy(parts, &vector, sizeof parts);
  quad total = (parts[0] + parts[2]) + (parts[1] + parts[3]);
  return (total[0] + total[2]) + (total[1] + total[3]);
}

typedef struct {
  const float *x;  // [rows, padded]; of every BLOCK of a row, for bfloat16, first the even inputs, then the odd ones
  const char *w;
  float *out;  // [rows, outputs]
  int64_t rows, inputs, padded, outputs, outputs_per_chunk;
  int is_bfloat16;
  long chunks;
  atomic_long next, done, users;
} Job;

// Adds the products of a block of inputs to the sums [T, O]. A bfloat16 is the upper half of a float32.
INLINE void add_block(
    floats sums[TILE][TILE], const words *packed, const float *x, int64_t padded, const int O, const int T) {
  for (int odd = 0; odd < 2; odd++) {
    floats xs[TILE];
    for (int t = 0; t < T; t++) xs[t] = load(x + t * padded + odd * LANES);
    for (int o = 0; o < O; o++) {
      floats weights = (floats)(odd ? packed[o] & 0xffff0000u : packed[o] << 16);
      for (int t = 0; t < T; t++) sums[t][o] += weights * xs[t];
    }
  }
}

// O outputs, from `o` on, of T rows, from `t` on.
INLINE void tile(const Job *job, int64_t o, int64_t t, const int O, const int T) {
  const int64_t bytes = 2 * job->inputs, whole = job->inputs / BLOCK;
  const char *w = job->w + o * bytes;
  const float *x = job->x + t * job->padded;
  // Processors prefetch within a page: too little where every output's weights are short, so ask for the next tile's.
  const int64_t ahead = bytes < 4096 ? O * bytes : 1024;
  floats sums[TILE][TILE];
  words packed[TILE];
  for (int j = 0; j < T; j++)
    for (int i = 0; i < O; i++) sums[j][i] = (floats){0};
  for (int64_t b = 0; b < whole; b++) {
    for (int i = 0; i < O; i++) {
      const char *from = w + i * bytes + b * sizeof(words);
      memcpy(&packed[i], from, sizeof(words));
      __builtin_prefetch(from + ahead);
    }
    add_block(sums, packed, x + b * BLOCK, job->padded, O, T);
  }
  if (whole * BLOCK < job->inputs) {
    for (int i = 0; i < O; i++) {
      packed[i] = (words){0};
      memcpy(&packed[i], w + i * bytes + whole * sizeof(words), bytes - whole * sizeof(words));
    }
    add_block(sums, packed, x + whole * BLOCK, job->padded, O, T);
  }
  for (int j = 0; j < T; j++)
    for (int i = 0; i < O; i++) job->out[(t + j) * job->outputs + o + i] = sum(sums[j][i]);
}

INLINE void tiles(const Job *job, int64_t o, const int O) {
  int64_t t = 0;
  for (; t + TILE <= job->rows; t += TILE) tile(job, o, t, O, TILE);
  switch (job->rows - t) {
    case 1: tile(job, o, t, O, 1); break;
    case 2: tile(job, o, t, O, 2); break;
    case 3: tile(job, o, t, O, 3); break;
  }
}

static void multiply_bfloat16(const Job *job, int64_t begin, int64_t end) {
  int64_t o = begin;
  for (; o + TILE <= end; o += TILE) tiles(job, o, TILE);
  for (; o < end; o++) tiles(job, o, 1);
}

// Adds the products of D inputs, from `i` on, to the sums of the outputs from `begin` to `end`.
INLINE void add_inputs(const Job *job, float sums[][COLUMNS], int64_t i, int64_t begin, int64_t end, const int D) {
  const float *w = (const float *)job->w + i * job->outputs, *x = job->x + i;
  int64_t o = begin;
  for (; o + LANES <= end; o += LANES) {
    floats weights[DEPTH];
    for (int d = 0; d < D; d++) {
      weights[d] = load(w + d * job->outputs + o);
      __builtin_prefetch(w + (D + d) * job->outputs + o);
    }
    for (int64_t t = 0; t < job->rows; t++) {
      floats total = load(sums[t] + (o - begin));
      for (int d = 0; d < D; d++) total += weights[d] * x[t * job->padded + d];
      memcpy(sums[t] + (o - begin), &total, sizeof total);
    }
  }
  for (; o < end; o++)
    for (int64_t t = 0; t < job->rows; t++)
      for (int d = 0; d < D; d++) sums[t][o - begin] += w[d * job->outputs + o] * x[t * job->padded + d];
}

static void multiply_float32(const Job *job, int64_t begin, int64_t end) {
  float sums[MAX_ROWS][COLUMNS];
  for (int64_t t = 0; t < job->rows; t++) memset(sums[t], 0, (end - begin) * sizeof(float));
  int64_t i = 0;
  for (; i + DEPTH <= job->inputs; i += DEPTH) add_inputs(job, sums, i, begin, end, DEPTH);
  for (; i < job->inputs; i++) add_inputs(job, sums, i, begin, end, 1);
  for (int64_t t = 0; t < job->rows; t++)
    memcpy(job->out + t * job->outputs + begin, sums[t], (end - begin) * sizeof(float));
}

static void run_chunks(Job *job) {
  for (long chunk; (chunk = atomic_fetch_add(&job->next, 1)) < job->chunks; atomic_fetch_add(&job->done, 1)) {
    int64_t begin = chunk * job->outputs_per_chunk, end = begin + job->outputs_per_chunk;
    if (end > job->outputs) end = job->outputs;
    (job->is_bfloat16 ? multiply_bfloat16 : multiply_float32)(job, begin, end);
  }
}

static void leave(Job *job) {
  if (atomic_fetch_sub(&job->users, 1) == 1) free(job);
}

// A helper that starts late finds no chunk left, and does not touch the arrays, which may be gone by then.
static void help(void *job) {
  run_chunks(job);
  leave(job);
}

static Job *make_job(const XLA_FFI_Buffer *x, const XLA_FFI_Buffer *w, const XLA_FFI_Buffer *out) {
  const int is_bfloat16 = w->dtype == XLA_FFI_DataType_BF16;
  const int64_t rows = x->dims[0], inputs = x->dims[1], outputs = out->dims[1];
  const int64_t padded = is_bfloat16 ? (inputs + BLOCK - 1) / BLOCK * BLOCK : inputs;
  Job *job = malloc(sizeof *job + (is_bfloat16 ? rows * padded * sizeof(float) : 0));
  if (!job) return NULL;
  *job = (Job){
      .x = x->data, .w = w->data, .out = out->data, .rows = rows, .inputs = inputs, .padded = padded,
      .outputs = outputs, .is_bfloat16 = is_bfloat16, .users = 1};
  if (is_bfloat16) {
    float *ordered = (float *)(job + 1);
    job->x = ordered;
    for (int64_t t = 0; t < rows; t++)
      for (int64_t b = 0; b < padded; b += BLOCK)
        for (int odd = 0; odd < 2; odd++)
          for (int64_t i = b + odd; i < b + BLOCK; i += 2)
            *ordered++ = i < inputs ? ((const float *)x->data)[t * inputs + i] : 0;
  }
  return job;
}

// Whether a call of the interface failed. Without threads from XLA, the caller does all the work.
static int failed(const XLA_FFI_Api *api, XLA_FFI_Error *error) {
  if (!error) return 0;
  XLA_FFI_Error_Destroy_Args destroy = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
  api->XLA_FFI_Error_Destroy(&destroy);
  return 1;
}

XLA_FFI_Error *specjax_product(XLA_FFI_CallFrame *frame) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata *metadata = ((XLA_FFI_Metadata_Extension *)frame->extension_start)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return NULL;
  }
  const XLA_FFI_Api *api = frame->api;
  Job *job = make_job(frame->args.args[0], frame->args.args[1], frame->rets.rets[0]);
  if (!job) {
    XLA_FFI_Error_Create_Args error = {
        XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, "specjax: out of memory", XLA_FFI_Error_Code_RESOURCE_EXHAUSTED};
    return api->XLA_FFI_Error_Create(&error);
  }
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args number = {
      XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, frame->ctx, &threads};
  if (failed(api, api->XLA_FFI_ThreadPool_NumThreads(&number)) || threads < 1) threads = 1;
  // Two chunks a thread, so that a thread that starts late does not leave half of the work to the others.
  int64_t each = job->outputs / (2 * threads) / LANES * LANES;
  if (!job->is_bfloat16 && each > COLUMNS) each = COLUMNS;
  job->outputs_per_chunk = each > LANES ? each : LANES;
  job->chunks = (job->outputs + job->outputs_per_chunk - 1) / job->outputs_per_chunk;
  for (long helper = 1; helper < threads && helper < job->chunks; helper++) {
    atomic_fetch_add(&job->users, 1);
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, frame->ctx, help, job};
    if (failed(api, api->XLA_FFI_ThreadPool_Schedule(&task))) {
      leave(job);
      break;
    }
  }
  // The caller takes chunks too, so that it never waits for a helper that has not started.
  run_chunks(job);
  while (atomic_load(&job->done) < job->chunks) PAUSE();
  leave(job);
  return NULL;
}
