/* The client library (libelgate_client.so): what runs inside applications. Every SDK calls this and nothing else.
 *
 * Conventions
 *   - Functions return 0 or a count on success, and -errno on failure; they never touch the caller's errno.
 *   - ELGATE_NATIVE: the descriptor is not Elgate's; do the operation natively. Costs one table look-up.
 *   - Every function may be called from any thread, but for those marked otherwise; none allocates on the data path.
 *   - Nothing waits without a limit: a daemon that is gone is waited for up to ELGATE_RECONNECT_TIMEOUT_MS
 *     (environment, default 30000), then the operation fails with -EIO.
 *   - cffi reads this file (hatch_build.py): no preprocessor but the guards and the constants below.
 */
#ifndef ELGATE_CLIENT_H
#define ELGATE_CLIENT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

/* Not an errno: errnos end at 4095. */
#define ELGATE_NATIVE -4096

/* Acknowledgement levels of elgate_wait and elgate_level: in shared memory (survives this process, and the daemon); in the
 * log, perhaps not synced (the same); synced (survives a power cut); in the file, where every process can read it. */
#define ELGATE_ACCEPTED 0
#define ELGATE_LOGGED 1
#define ELGATE_DURABLE 2
#define ELGATE_APPLIED 3

/* Why a file went native (elgate_go_native). */
#define ELGATE_REASON_MAPPED 1
#define ELGATE_REASON_DIRECT 2
#define ELGATE_REASON_LARGE_WRITE 3
#define ELGATE_REASON_KERNEL_COPY 4
#define ELGATE_REASON_PASSED_ON 5
#define ELGATE_REASON_LINKED 6
#define ELGATE_REASON_UNSUPPORTED 7
#define ELGATE_REASON_UNLINKED 8

/* Counters of this process, since it began. */
struct elgate_client_status {
    uint32_t connected;              /* 1: a session with a daemon is open */
    uint32_t disabled;               /* 1: ELGATE_DISABLE=1, or no daemon and passthrough */
    uint64_t routed_files;           /* now open */
    uint64_t routed_operations;      /* that went into the ring */
    uint64_t routed_bytes;
    uint64_t native_bytes;           /* written natively to files on a route */
    uint64_t native_fallbacks;       /* files on a route that are or went native */
    uint64_t registrations;
    uint64_t reconnects;
    uint64_t full_ring_waits;
    uint64_t late_wakes;
    uint64_t last_fallback_reason;   /* control.Refusal, or 100 + ELGATE_REASON_* */
    uint64_t test_stub;              /* 1: the daemon is the test stub: nothing is durable */
};

/* Connects to the daemon: ELGATE_SOCKET, else $XDG_RUNTIME_DIR/elgate/control.sock, else
 * /run/user/<uid>/elgate/control.sock, /tmp/elgate-<uid>/control.sock, /run/elgate/control.sock; a daemon of
 * another user (but root) is not spoken to. `runtime` names the SDK ("python"). Returns 1 connected, 0 no daemon and
 * ELGATE_FALLBACK=passthrough (everything stays native, one line on stderr), -errno else. Idempotent. */
int elgate_start(const char *runtime);

/* For runtimes that run a program's signal handlers between calls: from now on a wait that a signal comes into ends with
 * -EINTR, for the whole process. Nothing has happened then, and the call is to be made again once the handlers have run
 * (the limit of a wait for the daemon goes on counting). What cannot be begun again does not end so: a write that was
 * accepted and waits for what its route or descriptor promises, ftruncate, fallocate, and what goes around opening,
 * duplicating and forking. */
void elgate_answer_signals(void);

/* 1 if an open of this path for writing would be routed (the path is made absolute and its symlinks resolved),
 * else 0. Never blocks on the daemon unless a route table must be fetched. */
int elgate_path_is_routed(const char *path);

/* After a successful native open: tells the client about the descriptor. `flags` are those of open(2).
 * Returns 1 routed (registration follows with the first operation), 0 native, -errno where the open must fail
 * (a file with pending records in the log and no daemon: the caller closes fd and reports the error). */
int elgate_opened(int fd, const char *path, int flags);

/* 1 routed, 0 native. Also 1 for a descriptor on a route that is only read: drain before looking at it, so that
 * this process reads its own writes. */
int elgate_is_routed(int fd);

/* As the system call of the same name. A write that Elgate accepts is never short. */
int64_t elgate_write(int fd, const void *buffer, size_t length_bytes);
int64_t elgate_writev(int fd, const struct iovec *vectors, int count);
int64_t elgate_pwrite(int fd, const void *buffer, size_t length_bytes, int64_t offset);
int64_t elgate_pwritev(int fd, const struct iovec *vectors, int count, int64_t offset);

/* fsync and fdatasync: durable and visible when it returns 0. */
int elgate_fsync(int fd);
int elgate_ftruncate(int fd, int64_t length_bytes);
int elgate_fallocate(int fd, int mode, int64_t offset, int64_t length_bytes);

/* Before any native look at the file (read, stat, lseek, sendfile, locks, rename, fork …): waits until this
 * process's writes to it are applied, and puts the kernel's offset where a native program would find it. 0 for a
 * native descriptor. A deferred error is shown, not consumed: who only reads may ignore it, and the next write,
 * fsync or close still reports it. */
int elgate_drain(int fd);
/* The same for all routed descriptors; the first error, if any. */
int elgate_drain_all(void);
/* Also that, but no longer than `timeout_ms`: then -ETIMEDOUT. What is left is in the ring, where the daemon has it. */
int elgate_drain_all_within(int64_t timeout_ms);

/* Before close(2): drains, releases the registration when the last duplicate goes. The caller closes fd in
 * any case; an error is what close must report. */
int elgate_close(int fd);

/* After dup, dup2, dup3, F_DUPFD: `copy` shares the registration of `fd`. ELGATE_NATIVE if fd is native (an
 * entry that `copy` may have had is forgotten). For dup2, call elgate_close(copy) first. */
int elgate_duplicated(int fd, int copy);

/* F_SETFL changed O_APPEND, O_NONBLOCK or O_DSYNC: looks again. */
int elgate_flags_changed(int fd);

/* Drains, fences (nothing older is ever replayed), and leaves the file native for good. */
int elgate_go_native(int fd, int reason);

/* Before rename(2) and unlink(2): the log hears of it first, durably, if it concerns a file that the log has something
 * for (it carries the attribute user.elgate), or a directory that such files may lie below. A replay then finds them
 * under either name. 0: nothing to say; 1: it is said; -errno: it could not be, and the caller must not do it. If what
 * was said does not happen after all, say that each file is renamed to the name that it has. */
int elgate_before_rename(const char *old_path, const char *new_path);
int elgate_before_unlink(const char *path);

/* Explicit appends: as write with O_APPEND, but returns at once with a ticket to wait on. `fd` must be routed. */
int elgate_append(int fd, const void *buffer, size_t length_bytes, uint64_t *ticket);
/* Waits until the operation behind `ticket` has reached `level`; timeout_ms < 0: the process's limit. Whoever waits for
 * ELGATE_DURABLE on a route that syncs late (flush: interval, none) asks for a sync at once. There a record may be in its
 * file before it is durable: waiting for ELGATE_APPLIED waits for that alone.
 * 0 reached, -ETIMEDOUT, or the file's error. */
int elgate_wait(int fd, uint64_t ticket, int level, int64_t timeout_ms);
/* The highest level that the operation has reached together with all below it, without waiting, and without asking for
 * anything; -errno where that cannot be known any more. What is in its file and not durable yet is at ELGATE_LOGGED;
 * what its file has refused is at ELGATE_DURABLE. */
int elgate_level(int fd, uint64_t ticket);

/* Around fork(2): before, in the parent (drains); after, in the child (forgets the parent's session; routed
 * descriptors attach anew on their first use). */
int elgate_before_fork(void);
void elgate_after_fork_in_child(void);

/* The calling thread will write no more: gives its row back. Called by itself when a thread ends. */
void elgate_thread_detach(void);

void elgate_get_status(struct elgate_client_status *status);

/* Drains everything and closes the session. */
int elgate_stop(void);

#endif
