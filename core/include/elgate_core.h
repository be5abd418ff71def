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

/* "0.1.0 zig 0.15.2 ReleaseFast x86_64" */
const char *elgate_core_version(void);

#endif
