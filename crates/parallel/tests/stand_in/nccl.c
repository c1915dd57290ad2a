/* Not NCCL: a library with the functions of nccl.h and cuda.h that the crate calls, which holds its
 * caller to what these headers say. It reduces, broadcasts and gathers between processes, through a
 * file that all of them map, and later than it is asked to: as a GPU does. A caller that breaks a
 * rule is told which one, and ended. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { SUCCESS = 0, SYSTEM_ERROR = 2, REMOTE_ERROR = 6 };
enum { UINT8 = 1, INT64 = 4, FLOAT16 = 6, FLOAT32 = 7, FLOAT64 = 8, BFLOAT16 = 9 };
enum { SUM = 0, MAX = 2 };
enum { MAX_RANKS = 8, CHUNK = 1 << 20, ID_PATH = 96 };
#define MAGIC 0x6e63636cu

typedef struct { char bytes[128]; } unique_id;

#define MISUSE(...) (fprintf(stderr, "misuse of NCCL: " __VA_ARGS__), fputc('\n', stderr), _exit(66))

/* What the processes of a group share. */
struct shared {
  atomic_uint arrived, round, aborted;
  struct { char what[8]; uint64_t count, kind, number; } calls[MAX_RANKS];
  unsigned char places[MAX_RANKS][CHUNK];
};

struct comm { unsigned magic; int rank, ranks; struct shared *shared; unsigned finished; int failed; };

struct call { char what[8]; const char *from; char *to; size_t count; int kind, number; struct comm *comm; };

static struct call queue[256];
static unsigned enqueued, grouped, done;
static int depth, polled = 1;
/* Calls of each kind, which a process tells at its end. */
static struct { unsigned sum, max, broadcast, gather; } called;
static _Thread_local int current;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER;

static size_t size_of(int kind) {
  switch (kind) {
    case UINT8: return 1;
    case FLOAT16: case BFLOAT16: return 2;
    case FLOAT32: return 4;
    case FLOAT64: case INT64: return 8;
    default: MISUSE("%d is no type that is used", kind); return 0;
  }
}

static float of_bfloat16(uint16_t bits) { uint32_t wide = (uint32_t)bits << 16; float value; memcpy(&value, &wide, 4); return value; }

/* A value of a 16-bit kind that orders as its floating point does. */
static int order_of(uint16_t bits) { return bits & 0x8000 ? -(bits & 0x7fff) : bits; }

static void combine(char *to, const unsigned char *from, size_t count, int kind, int op) {
#define EACH(type) { \
    type *a = (type *)to; \
    const type *b = (const type *)from; \
    for (size_t i = 0; i < count; i++) { a[i] = op == SUM ? a[i] + b[i] : b[i] > a[i] ? b[i] : a[i]; } \
    break; \
  }
  switch (kind) {
    case FLOAT32: EACH(float)
    case FLOAT64: EACH(double)
    case INT64: EACH(int64_t)
    default: {
      uint16_t *a = (uint16_t *)to; const uint16_t *b = (const uint16_t *)from;
      if (op == SUM || (kind != FLOAT16 && kind != BFLOAT16)) MISUSE("type %d is not reduced by %d here", kind, op);
      for (size_t i = 0; i < count; i++) {
        int more = kind == FLOAT16 ? order_of(b[i]) > order_of(a[i]) : of_bfloat16(b[i]) > of_bfloat16(a[i]);
        if (more) a[i] = b[i];
      }
    }
  }
}

/* Waits for all ranks; false where one of them aborts. */
static int meet(struct comm *comm) {
  struct shared *shared = comm->shared;
  unsigned round = atomic_load(&shared->round);
  if (atomic_fetch_add(&shared->arrived, 1) + 1 == (unsigned)comm->ranks) {
    atomic_store(&shared->arrived, 0);
    atomic_fetch_add(&shared->round, 1);
  }
  while (atomic_load(&shared->round) == round) {
    if (atomic_load(&shared->aborted)) return 0;
    struct timespec pause = {0, 20000};
    nanosleep(&pause, NULL);
  }
  return 1;
}

static int agree(struct call *call) {
  struct comm *comm = call->comm;
  struct shared *shared = comm->shared;
  memcpy(shared->calls[comm->rank].what, call->what, 8);
  shared->calls[comm->rank].count = call->count;
  shared->calls[comm->rank].kind = call->kind;
  shared->calls[comm->rank].number = call->number;
  if (!meet(comm)) return 0;
  for (int rank = 0; rank < comm->ranks; rank++)
    if (memcmp(&shared->calls[rank], &shared->calls[comm->rank], sizeof shared->calls[0]))
      MISUSE("rank %d is in %s of %zu x type %d (%d), rank %d in %s of %zu x type %d (%d)", comm->rank, call->what,
             call->count, call->kind, call->number, rank, shared->calls[rank].what, (size_t)shared->calls[rank].count,
             (int)shared->calls[rank].kind, (int)shared->calls[rank].number);
  return meet(comm);
}

static int perform(struct call *call) {
  struct comm *comm = call->comm;
  size_t size = size_of(call->kind), step = CHUNK / size;
  if (!agree(call)) return 0;
  for (size_t start = 0; start < call->count; start += step) {
    size_t count = call->count - start < step ? call->count - start : step;
    memcpy(comm->shared->places[comm->rank], call->from + start * size, count * size);
    if (!meet(comm)) return 0;
    if (call->what[0] == 'r') {
      memcpy(call->to + start * size, comm->shared->places[0], count * size);
      for (int rank = 1; rank < comm->ranks; rank++)
        combine(call->to + start * size, comm->shared->places[rank], count, call->kind, call->number);
    } else if (call->what[0] == 'b') {
      memcpy(call->to + start * size, comm->shared->places[call->number], count * size);
    } else {
      for (int rank = 0; rank < comm->ranks; rank++)
        memcpy(call->to + (rank * call->count + start) * size, comm->shared->places[rank], count * size);
    }
    if (!meet(comm)) return 0;
  }
  return 1;
}

/* Is asked to fail at its Nth collective by the environment. */
static int fails(struct comm *comm) {
  const char *number = getenv("NCCL_STAND_IN_FAILS"), *rank = getenv("NCCL_STAND_IN_RANK");
  return number && comm->finished == (unsigned)atoi(number) && (!rank || atoi(rank) == comm->rank);
}

static void *device(void *unused) {
  (void)unused;
  for (;;) {
    pthread_mutex_lock(&lock);
    while (done == enqueued) pthread_cond_wait(&work, &lock);
    struct call call = queue[done % 256];
    pthread_mutex_unlock(&lock);
    if (fails(call.comm)) {
      call.comm->failed = REMOTE_ERROR;
      atomic_store(&call.comm->shared->aborted, 1);
    }
    if (call.comm->failed || !perform(&call)) {
      call.comm->failed = REMOTE_ERROR;
      return NULL; /* A GPU whose collective never ends. */
    }
    call.comm->finished++;
    pthread_mutex_lock(&lock);
    done++;
    pthread_mutex_unlock(&lock);
  }
}

static void leave(void) {
  if (depth) MISUSE("%d groups were never ended", depth);
  if (!polled) MISUSE("the state of the last collective was never asked for");
  fprintf(stderr, "NCCL was called for %u sums, %u maxima, %u broadcasts, %u gathers\n", called.sum, called.max,
          called.broadcast, called.gather);
}

static void submit(struct call call, void *stream) {
  struct comm *comm = call.comm;
  if (!comm || comm->magic != MAGIC) MISUSE("%s: no communicator", call.what);
  if (!current) MISUSE("%s: no GPU is current in this thread", call.what);
  if (stream) MISUSE("%s: not the null stream", call.what);
  if (!call.from || !call.to) MISUSE("%s: a null pointer", call.what);
  if (!call.count) MISUSE("%s: no elements", call.what);
  size_of(call.kind);
  pthread_mutex_lock(&lock);
  if (grouped - done >= 256) MISUSE("more calls in one group than there is room for");
  queue[grouped++ % 256] = call;
  if (!depth) enqueued = grouped;
  polled = 0;
  pthread_cond_signal(&work);
  pthread_mutex_unlock(&lock);
}

/* What an identity holds behind its path: none of its bytes may be lost on the way. */
static char filling(size_t place) { return (char)(0x80 | place); }

int ncclGetUniqueId(unique_id *id) {
  static unsigned made;
  const char *folder = getenv("NCCL_STAND_IN_FOLDER");
  int length = snprintf(id->bytes, ID_PATH, "%s/group-%d-%u", folder ? folder : "/tmp", (int)getpid(), made++);
  if (length < 0 || length >= ID_PATH) MISUSE("a folder whose name is too long for an identity");
  for (size_t place = (size_t)length + 1; place < sizeof id->bytes; place++) id->bytes[place] = filling(place);
  return SUCCESS;
}

static void check_identity(const unique_id *id) {
  const char *end = memchr(id->bytes, 0, ID_PATH);
  if (!end || id->bytes[0] != '/') MISUSE("ncclCommInitRank: not an identity");
  for (size_t place = (size_t)(end - id->bytes) + 1; place < sizeof id->bytes; place++)
    if (id->bytes[place] != filling(place)) MISUSE("ncclCommInitRank: byte %zu of an identity is another", place);
}

int ncclCommInitRank(void **comm, int ranks, unique_id id, int rank) {
  static int started;
  if (!current) MISUSE("ncclCommInitRank: no GPU is current in this thread");
  if (ranks < 1 || ranks > MAX_RANKS || rank < 0 || rank >= ranks)
    MISUSE("ncclCommInitRank: rank %d of %d", rank, ranks);
  check_identity(&id);
  if (!started++) {
    pthread_t thread;
    atexit(leave);
    if (pthread_create(&thread, NULL, device, NULL)) return SYSTEM_ERROR;
  }
  int file = open(id.bytes, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(struct shared))) return SYSTEM_ERROR;
  struct comm *made = calloc(1, sizeof *made);
  made->shared = mmap(NULL, sizeof(struct shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (made->shared == MAP_FAILED) return SYSTEM_ERROR;
  made->magic = MAGIC, made->rank = rank, made->ranks = ranks;
  *comm = made;
  return meet(made) ? SUCCESS : REMOTE_ERROR;
}

int ncclAllReduce(const void *from, void *to, size_t count, int kind, int op, void *comm, void *stream) {
  if (op != SUM && op != MAX) MISUSE("ncclAllReduce: %d is no operation that is used", op);
  if (op == SUM) called.sum++; else called.max++;
  submit((struct call){"reduce", from, to, count, kind, op, comm}, stream);
  return SUCCESS;
}

int ncclBroadcast(const void *from, void *to, size_t count, int kind, int root, void *comm, void *stream) {
  if (comm && (root < 0 || root >= ((struct comm *)comm)->ranks)) MISUSE("ncclBroadcast: root %d", root);
  called.broadcast++;
  submit((struct call){"bcast", from, to, count, kind, root, comm}, stream);
  return SUCCESS;
}

int ncclAllGather(const void *from, void *to, size_t count, int kind, void *comm, void *stream) {
  called.gather++;
  submit((struct call){"gather", from, to, count, kind, 0, comm}, stream);
  return SUCCESS;
}

int ncclGroupStart(void) {
  pthread_mutex_lock(&lock);
  if (depth++) MISUSE("a group within a group");
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int ncclGroupEnd(void) {
  pthread_mutex_lock(&lock);
  if (!depth--) MISUSE("the end of a group that was never started");
  enqueued = grouped;
  pthread_cond_signal(&work);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int ncclCommGetAsyncError(void *comm, int *state) {
  if (!comm || ((struct comm *)comm)->magic != MAGIC) MISUSE("ncclCommGetAsyncError: no communicator");
  *state = ((struct comm *)comm)->failed;
  polled = 1;
  return SUCCESS;
}

int ncclCommAbort(void *comm) {
  if (!comm || ((struct comm *)comm)->magic != MAGIC) MISUSE("ncclCommAbort: no communicator");
  atomic_store(&((struct comm *)comm)->shared->aborted, 1);
  ((struct comm *)comm)->magic = 0;
  fputs("NCCL was told to abort\n", stderr);
  return SUCCESS;
}

const char *ncclGetErrorString(int code) { return code == REMOTE_ERROR ? "a rank is gone" : "made up"; }

int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGet(int *gpu, int ordinal) { *gpu = 40 + ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int gpu) {
  if (gpu != 40) MISUSE("a context of GPU %d", gpu);
  *context = &queue;
  return 0;
}
int cuCtxSetCurrent(void *context) { current = context == &queue; return current ? 0 : 201; }
int cuStreamQuery(void *stream) {
  if (stream || !current) MISUSE("cuStreamQuery: another stream, or no GPU is current");
  pthread_mutex_lock(&lock);
  int busy = done != enqueued;
  pthread_mutex_unlock(&lock);
  return busy ? 600 : 0;
}
