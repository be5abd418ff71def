/* The engine (libelgate_core.so): what runs in the daemon, on native threads of its own. The daemon's Python
 * side configures it, starts it, reads events and counters, and stops it; no call here is on a data path.
 *
 * Conventions as in elgate_client.h: 0 or a count on success, -errno on failure, errno untouched. Strings are
 * UTF-8, copied by the callee. Functions may be called from any thread; start and stop only once each per engine.
 */
#ifndef ELGATE_CORE_H
#define ELGATE_CORE_H

#include <stddef.h>
#include <stdint.h>

/* When records become durable that nobody waits for. fsync, O_SYNC and elgate_wait(ELGATE_DURABLE) are durable in every
 * mode, and ask at once. */
#define ELGATE_FLUSH_GROUP 0    /* with the write of their group */
#define ELGATE_FLUSH_ALWAYS 1   /* the same, and every write waits for it */
#define ELGATE_FLUSH_INTERVAL 2 /* flush_interval_ms after the oldest of them was logged */
#define ELGATE_FLUSH_NONE 3     /* when a checkpoint is due */
#define ELGATE_FLUSH_INTERVAL_MS_MAX 60000

#define ELGATE_VISIBILITY_DEFERRED 0
#define ELGATE_VISIBILITY_IMMEDIATE 1

#define ELGATE_ON_FULL_BLOCK 0
#define ELGATE_ON_FULL_ERROR 1

/* elgate_engine_config.flags */
#define ELGATE_ENGINE_ALLOW_VOLATILE 1  /* accept a log directory on tmpfs or overlay */
#define ELGATE_ENGINE_NULL_SINK 2       /* measure the ring alone: records are checked and dropped */
#define ELGATE_ENGINE_IO_URING 4        /* apply through io_uring instead of a thread per file system */
#define ELGATE_ENGINE_RING_PER_CLIENT 8 /* each client process gets a ring of its own */

struct elgate_route_config {
    const char *name;                /* 1..64 of [a-z0-9_-]; names the log directory */
    const char *pattern;             /* absolute glob */
    uint32_t flush;
    uint32_t flush_interval_ms;      /* 1..ELGATE_FLUSH_INTERVAL_MS_MAX; 0 in the other modes */
    uint32_t visibility;
    uint32_t on_full;
    uint64_t segment_bytes;          /* a multiple of 1 MiB */
    uint64_t log_bytes_max;
};

struct elgate_engine_config {
    const char *control_socket;
    uint32_t control_mode;           /* permission bits of the socket */
    int32_t control_gid;             /* -1: the daemon's own */
    const char *ring_path;
    const char *log_directory;
    uint32_t flags;
    uint32_t route_count;
    const struct elgate_route_config *routes;
    uint64_t log_age_max_ms;         /* how long segments are kept that a checkpoint has passed; 0: not at all */
    uint64_t checkpoint_bytes;       /* 0: default (64 MiB) */
    uint32_t checkpoint_interval_ms; /* 0: default (5000) */
    uint32_t reserved;
    /* NULL, or called in elgate_engine_start, by the same thread, about once a second while the replay of a route's
     * log takes more than 2 s: bytes read of it, and to be read, in all passes over it. */
    void (*progress)(const char *route, uint64_t done_bytes, uint64_t total_bytes);
    const char *stub_path;           /* not NULL: the test stub, with its table there (see elgate_stub_open) */
};

struct elgate_engine;

/* Takes the locks, opens ring and logs, replays what is in them, then serves. On failure -errno, and
 * `error_text` (NUL-terminated) says what, where, why likely, and what to do. Blocks for the replay. */
int elgate_engine_start(const struct elgate_engine_config *config, struct elgate_engine **engine,
                        char *error_text, size_t error_bytes);

/* Swaps the routes. A route that is gone takes no new files; what its log holds is still applied. */
int elgate_engine_set_routes(struct elgate_engine *engine, const struct elgate_route_config *routes,
                             uint32_t route_count, char *error_text, size_t error_bytes);

/* Drains the ring, syncs the targets, writes checkpoints, closes. What is not drained within the limit stays
 * in ring and log for the next start (returns -ETIMEDOUT then). Events can still be read after it. */
int elgate_engine_stop(struct elgate_engine *engine, int64_t timeout_ms);

/* After elgate_engine_stop, once the reader of events has seen -EPIPE: frees everything. */
void elgate_engine_free(struct elgate_engine *engine);

/* The next event as one JSON object without newline, e.g. {"event":"session_opened","session":1,"uid":0}.
 * Every object has "event" and "level" ("info", "warning", "error"). Blocks up to timeout_ms; returns its length,
 * 0 if none came, -EPIPE once the engine stops. Events that nobody reads are dropped, counted. One reader. */
int elgate_engine_next_event(struct elgate_engine *engine, char *buffer, size_t buffer_bytes, int64_t timeout_ms);

/* Counters, monotonic since the start unless the name says otherwise. Names do not change while the process
 * lives: "records_total", "groups_total", … */
uint32_t elgate_engine_counter_count(void);
const char *elgate_engine_counter_name(uint32_t index);
int elgate_engine_counters(struct elgate_engine *engine, uint64_t *values, uint32_t count);

/* The test stub, from the side of the test: its table is a file that outlives the daemon. A table is one thread's. */
struct elgate_stub;

/* What stands in elgate_stub_operation.kind. 1 and 2 are for whoever reads the recording: a session (its process), a
 * daemon that has started. */
#define ELGATE_STUB_SESSION 1
#define ELGATE_STUB_START 2
#define ELGATE_STUB_OPEN 3      /* a program's first operation on a file that it has open */
#define ELGATE_STUB_WRITE 4     /* flags 1: with O_APPEND; data: what was written */
#define ELGATE_STUB_TRUNCATE 5  /* offset: the new size */
#define ELGATE_STUB_ALLOCATE 6  /* flags: the mode */
#define ELGATE_STUB_FSYNC 7     /* also fdatasync, O_SYNC, and a wait for "durable" */
#define ELGATE_STUB_CLOSE 8     /* of the last descriptor in a process */
#define ELGATE_STUB_NATIVE 9    /* flags: ELGATE_REASON_*; what is written from here on is not seen */
#define ELGATE_STUB_RENAME 10   /* announced; data: the new path */
#define ELGATE_STUB_UNLINK 11   /* announced: of the name */

/* Where a rule comes into force. */
#define ELGATE_STUB_AT_WRITE 1       /* the target refuses what one write brings, or hangs in it */
#define ELGATE_STUB_AT_TRUNCATE 2
#define ELGATE_STUB_AT_ALLOCATE 3
#define ELGATE_STUB_AT_FSYNC 4       /* one fsync fails, or the daemon hangs in it */
#define ELGATE_STUB_AT_LOG 5         /* the log's disk takes nothing, or hangs */
#define ELGATE_STUB_AT_FULL 6        /* the log is full: the route takes nothing new */
#define ELGATE_STUB_AT_TARGET_SYNC 7 /* the daemon's own syncs of a target */

struct elgate_stub_rule {
    uint32_t point;
    int32_t err;       /* errno; 0: what is met stalls until the rule is taken back */
    uint32_t skip;     /* operations that are let pass first */
    uint32_t times;    /* operations that are met then; 0: all, until the rule is taken back */
    const char *path;  /* glob; NULL: all files */
    const char *route; /* name; NULL: all routes */
};

struct elgate_stub_operation {
    uint32_t kind;
    uint32_t flags;
    uint64_t session;
    uint64_t offset;
    uint64_t length;
    uint64_t time_ns;  /* CLOCK_MONOTONIC */
    int32_t err;       /* what a rule made of it: errno, or 0 */
    uint32_t process_id;
    uint32_t thread_id;
    uint32_t path_length;
    uint32_t route_length;
    uint32_t data_length;
    const char *text;  /* in the caller's buffer: path, route, data */
};

struct elgate_stub_state {
    uint32_t served;   /* 1: its daemon lives */
    uint32_t stalled;  /* 1: it hangs in a rule */
    uint32_t failing;  /* files and routes that fail */
    uint32_t reserved;
    uint64_t recorded_bytes;
    uint64_t recording_bytes_max;
    uint64_t dropped;  /* operations that found no room in the recording */
};

/* A table that a daemon has made. -EPROTO: another build's, or none. */
int elgate_stub_open(const char *path, struct elgate_stub **stub);
void elgate_stub_close(struct elgate_stub *stub);

/* Returns when all rules are in force that were added and none that was removed, and what programs had sent by then is
 * recorded; or when the daemon hangs in a rule. -ESRCH: there is no daemon; -ETIMEDOUT. */
int elgate_stub_settle(struct elgate_stub *stub, int64_t timeout_ms);

/* Its number. -ENOSPC: there are 64 already. Settle, then it is in force. */
int elgate_stub_add_rule(struct elgate_stub *stub, const struct elgate_stub_rule *rule);
void elgate_stub_remove_rule(struct elgate_stub *stub, uint32_t rule);
/* How many operations have failed by it, or stalled. */
int64_t elgate_stub_rule_hits(struct elgate_stub *stub, uint32_t rule);
int elgate_stub_await_hits(struct elgate_stub *stub, uint32_t rule, uint32_t hits, int64_t timeout_ms);

/* The record at `at`, which is 0 or what all calls before have returned together. 0: there is none; -ENOBUFS. */
int64_t elgate_stub_read(struct elgate_stub *stub, uint64_t at, struct elgate_stub_operation *operation, char *buffer,
                         size_t buffer_bytes);
/* With the next settle: the recording begins anew. */
void elgate_stub_forget(struct elgate_stub *stub);
void elgate_stub_limit(struct elgate_stub *stub, uint64_t recording_bytes_max);
void elgate_stub_state(struct elgate_stub *stub, struct elgate_stub_state *state);

/* "0.1.0 zig 0.15.2 ReleaseFast x86_64" */
const char *elgate_core_version(void);

#endif
