// The product of a few rows with a large matrix on CPUs, `out = x @ w`, called through XLA's foreign function interface.
//
// A decoding step reads every weight once, for a few rows, and should take as long as memory takes to deliver them.
// XLA:CPU achieves that for one row of float32 only; for bfloat16, and for two to sixteen rows, it takes up to twice as
// long. Here every weight is read once, converted in a register, and multiplied with all rows. The order in which a
// result is summed depends neither on the number of rows nor on the number of threads, so that every row is, to the
// last bit, what it would be alone.
//
// float32 matrices are [inputs, outputs] and all others [outputs, inputs], as `linear.outputs_first` says. Integers, int8
// or two int4 in a byte, stand for `scale * w + offset` (`quantisation.Rounded`), with a scale for every group of inputs.

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
  BLOCK = 2 * LANES,  // inputs that are multiplied at a time: bfloat16 weights of a cache line
  TILE = 4,           // outputs, and rows, whose sums are in registers at the same time
  DEPTH = 8,          // float32 inputs that are added to the sums of all rows at a time
  COLUMNS = 512,      // float32 outputs whose sums, for MAX_ROWS rows, fit into the first cache
  MAX_ROWS = 16,      // the largest of `cpu_products.MAX_ROWS`
};

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef float quad __attribute__((vector_size(4 * LANES / 4)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef int8_t bytes __attribute__((vector_size(LANES)));

typedef enum { FLOAT32, BFLOAT16, INT8, INT4 } Kind;

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
  const float *x;  // [rows, padded]; of every BLOCK of a row, in the order in which `unpack` gives the weights
  const char *w;
  const float *scale, *offset;  // [outputs, groups]; NULL for none
  float *out;                   // [rows, outputs]
  int64_t rows, inputs, padded, outputs, groups, blocks_per_group, outputs_per_chunk;
  Kind kind;
  long chunks;
  atomic_long next, done, users;
} Job;

// The bytes of the weights of so many inputs.
INLINE int64_t size_of(int64_t inputs, const Kind kind) {
  return kind == BFLOAT16 ? 2 * inputs : kind == INT8 ? inputs : inputs / 2;
}

// LANES weights of a BLOCK, in float32: those of bfloat16, the upper halves of float32, and int4 with even or odd
// indices, the first or the last of int8.
INLINE floats unpack(const char *from, const int odd, const Kind kind) {
  if (kind == BFLOAT16) {
    words packed;
    memcpy(&packed, from, sizeof packed);
    return (floats)(odd ? packed & 0xffff0000u : packed << 16);
  }
  bytes packed;
  memcpy(&packed, kind == INT8 && odd ? from + LANES : from, sizeof packed);
  // In two steps: GCC 12 converts one element at a time where the size grows fourfold.
  ints whole = __builtin_convertvector(__builtin_convertvector(packed, shorts), ints);
  if (kind == INT4) whole = odd ? whole >> 4 : (whole << 28) >> 28;
  return __builtin_convertvector(whole, floats);
}

typedef struct {
  const char *from[TILE];             // the weights of a block of each output
  float scale[TILE], offset[TILE];  // of its group
} Block;

// Adds the products of a block of inputs to the sums [T, O].
INLINE void add_block(
    floats sums[TILE][TILE], const Block *block, const float *x, int64_t padded, const int O, const int T,
    const Kind kind) {
  for (int odd = 0; odd < 2; odd++) {
    floats xs[TILE];
    for (int t = 0; t < T; t++) xs[t] = load(x + t * padded + odd * LANES);
    for (int o = 0; o < O; o++) {
      floats weights = unpack(block->from[o], odd, kind);
      if (kind != BFLOAT16) weights = weights * block->scale[o] + block->offset[o];
      for (int t = 0; t < T; t++) sums[t][o] += weights * xs[t];
    }
  }
}

// O outputs, from `o` on, of T rows, from `t` on.
INLINE void tile(const Job *job, int64_t o, int64_t t, const int O, const int T, const Kind kind) {
  const int64_t bytes = size_of(job->inputs, kind), whole = job->inputs / BLOCK, step = size_of(BLOCK, kind);
  const char *w = job->w + o * bytes;
  const float *x = job->x + t * job->padded;
  // Processors prefetch within a page: too little where every output's weights are short, so ask for the next tile's.
  const int64_t ahead = bytes < 4096 ? O * bytes : 1024;
  floats sums[TILE][TILE];
  Block block = {{NULL}, {0}, {0}};
  for (int j = 0; j < T; j++)
    for (int i = 0; i < O; i++) sums[j][i] = (floats){0};
  for (int64_t group = 0, b = 0; group < job->groups; group++) {
    for (int i = 0; kind != BFLOAT16 && i < O; i++) {
      block.scale[i] = job->scale[(o + i) * job->groups + group];
      if (job->offset) block.offset[i] = job->offset[(o + i) * job->groups + group];
    }
    for (int64_t end = b + job->blocks_per_group; b < end; b++) {
      for (int i = 0; i < O; i++) {
        block.from[i] = w + i * bytes + b * step;
        if (b * step % sizeof(words) == 0) __builtin_prefetch(block.from[i] + ahead);
      }
      add_block(sums, &block, x + b * BLOCK, job->padded, O, T, kind);
    }
  }
  if (whole * BLOCK < job->inputs) {
    char rest[TILE][2 * BLOCK] = {{0}};
    for (int i = 0; i < O; i++) {
      memcpy(rest[i], w + i * bytes + whole * step, bytes - whole * step);
      block.from[i] = rest[i];
    }
    add_block(sums, &block, x + whole * BLOCK, job->padded, O, T, kind);
  }
  for (int j = 0; j < T; j++)
    for (int i = 0; i < O; i++) job->out[(t + j) * job->outputs + o + i] = sum(sums[j][i]);
}

INLINE void tiles(const Job *job, int64_t o, const Kind kind) {
  int64_t t = 0;
  for (; t + TILE <= job->rows; t += TILE) tile(job, o, t, TILE, TILE, kind);
  switch (job->rows - t) {
    case 1: tile(job, o, t, TILE, 1, kind); break;
    case 2: tile(job, o, t, TILE, 2, kind); break;
    case 3: tile(job, o, t, TILE, 3, kind); break;
  }
}

INLINE void multiply(const Job *job, int64_t begin, int64_t end, const Kind kind) {
  int64_t o = begin;
  for (; o + TILE <= end; o += TILE) tiles(job, o, kind);
  for (; o < end; o++)
    for (int64_t t = 0; t < job->rows; t++) tile(job, o, t, 1, 1, kind);
}

static void multiply_bfloat16(const Job *job, int64_t begin, int64_t end) { multiply(job, begin, end, BFLOAT16); }
static void multiply_int8(const Job *job, int64_t begin, int64_t end) { multiply(job, begin, end, INT8); }
static void multiply_int4(const Job *job, int64_t begin, int64_t end) { multiply(job, begin, end, INT4); }

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

typedef void (*Multiply)(const Job *, int64_t begin, int64_t end);

static Multiply function_of(const Job *job) {
  switch (job->kind) {
    case FLOAT32: return multiply_float32;
    case BFLOAT16: return multiply_bfloat16;
    case INT8: return multiply_int8;
    default: return multiply_int4;
  }
}

static void run_chunks(Job *job) {
  for (long chunk; (chunk = atomic_fetch_add(&job->next, 1)) < job->chunks; atomic_fetch_add(&job->done, 1)) {
    int64_t begin = chunk * job->outputs_per_chunk, end = begin + job->outputs_per_chunk;
    if (end > job->outputs) end = job->outputs;
    function_of(job)(job, begin, end);
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

static Kind kind_of(const XLA_FFI_Buffer *w) {
  switch (w->dtype) {
    case XLA_FFI_DataType_F32: return FLOAT32;
    case XLA_FFI_DataType_BF16: return BFLOAT16;
    case XLA_FFI_DataType_S8: return INT8;
    default: return INT4;
  }
}

// `scale` and `offset` are NULL for what a matrix lacks.
static Job *make_job(
    const XLA_FFI_Buffer *x, const XLA_FFI_Buffer *w, const XLA_FFI_Buffer *scale, const XLA_FFI_Buffer *offset,
    const XLA_FFI_Buffer *out) {
  const Kind kind = kind_of(w);
  const int64_t rows = x->dims[0], inputs = x->dims[1], outputs = out->dims[1];
  const int64_t padded = kind == FLOAT32 ? inputs : (inputs + BLOCK - 1) / BLOCK * BLOCK;
  const int64_t groups = scale ? scale->dims[1] : 1;
  Job *job = malloc(sizeof *job + (kind == FLOAT32 ? 0 : rows * padded * sizeof(float)));
  if (!job) return NULL;
  *job = (Job){
      .x = x->data, .w = w->data, .scale = scale ? scale->data : NULL, .offset = offset ? offset->data : NULL,
      .out = out->data, .rows = rows, .inputs = inputs, .padded = padded, .outputs = outputs, .groups = groups,
      .blocks_per_group = inputs / BLOCK / groups, .kind = kind, .users = 1};
  if (kind == FLOAT32) return job;
  float *ordered = (float *)(job + 1);
  const int step = kind == INT8 ? 1 : 2;  // as `unpack` says
  job->x = ordered;
  for (int64_t t = 0; t < rows; t++)
    for (int64_t b = 0; b < padded; b += BLOCK)
      for (int odd = 0; odd < 2; odd++)
        for (int lane = 0; lane < LANES; lane++) {
          const int64_t i = b + (kind == INT8 ? odd * LANES : odd) + lane * step;
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
  const XLA_FFI_Buffer *args[4] = {NULL, NULL, NULL, NULL};
  for (int64_t i = 0; i < frame->args.size && i < 4; i++) args[i] = frame->args.args[i];
  Job *job = make_job(args[0], args[1], args[2], args[3], frame->rets.rets[0]);
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
  if (job->kind == FLOAT32 && each > COLUMNS) each = COLUMNS;
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
