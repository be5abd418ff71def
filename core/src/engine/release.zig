//! Files that nobody has open any more are let go of: from then on a replay leaves them alone, and other programs may do
//! with them what they like.
//!
//! ```
//! closed by all ─▶ a moment passes ─▶ synced ─▶ `released` logged, durably ─▶ offered to the control thread, which
//!                                                                           takes the mark off
//! ```
//!
//! The moment is for programs that open, write and close one file over and over: whoever opens it meanwhile, or at any
//! step before the last, has it as it was. What cannot be let go of in this way, since its target or the log fails, is
//! with the first checkpoint that covers it.
//!
//! Worker thread.

const std = @import("std");
const assert = std.debug.assert;
const os = @import("os.zig");
const File = @import("files.zig").File;
const steps = @import("steps.zig");
const Worker = @import("worker.zig").Worker;

/// With what follows it, well within 100 ms.
const moment_ns = 30 * std.time.ns_per_ms;
/// For the programs of the daemon before to come back to their files.
const replayed_ns = std.time.ns_per_s;
/// Each of them holds two descriptors: where there are more, the oldest does not wait.
const waiting_max = 256;

pub const never: u64 = std.math.maxInt(u64);

/// Of a file.
pub const Release = struct {
    list: enum { none, waiting, logged } = .none,
    previous: ?*File = null,
    next: ?*File = null,
    due_ns: u64 = 0,
    /// Its sync is under way.
    syncing: bool = false,
    /// Of the last `released`; 0: none in this life.
    lsn: u64 = 0,
};

const List = struct {
    first: ?*File = null,
    last: ?*File = null,
    count: u32 = 0,

    /// Before all that are due later. (Those that a replay has found wait longer, and there are none of them but for a
    /// moment behind a start.)
    fn insert(list: *List, file: *File) void {
        var before = list.last;
        while (before) |other| : (before = other.release.previous) {
            if (other.release.due_ns <= file.release.due_ns) break;
        }
        const behind = if (before) |other| other.release.next else list.first;
        file.release.previous = before;
        file.release.next = behind;
        if (before) |other| other.release.next = file else list.first = file;
        if (behind) |other| other.release.previous = file else list.last = file;
        list.count += 1;
    }

    fn remove(list: *List, file: *File) void {
        const release = &file.release;
        if (release.previous) |before| before.release.next = release.next else list.first = release.next;
        if (release.next) |behind| behind.release.previous = release.previous else list.last = release.previous;
        list.count -= 1;
    }
};

pub const Releases = struct {
    /// The first one is due first.
    waiting: List = .{},
    /// `released` is in a group, or in the log.
    logged: List = .{},

    /// Its last handle is gone.
    pub fn closed(releases: *Releases, file: *File) void {
        releases.wait(file, os.monotonicNs() + moment_ns);
    }

    /// A replay has found it, and all that the rings held for it then is taken. Nobody has it open yet.
    pub fn replayed(releases: *Releases, file: *File) void {
        if (file.handle_list.items.len > 0 or file.release.list != .none or file.release.syncing) return;
        releases.wait(file, os.monotonicNs() + replayed_ns);
    }

    fn wait(releases: *Releases, file: *File, due_ns: u64) void {
        assert(file.handle_list.items.len == 0);
        releases.remove(file);
        file.release.list = .waiting;
        file.release.due_ns = due_ns;
        releases.waiting.insert(file);
    }

    /// It has been opened again, or let go of in another way.
    pub fn remove(releases: *Releases, file: *File) void {
        switch (file.release.list) {
            .none => {},
            .waiting => releases.waiting.remove(file),
            .logged => releases.logged.remove(file),
        }
        file.release.list = .none;
    }

    /// Before the commit of a batch: syncs those whose moment has passed, and logs what is synced.
    pub fn begin(releases: *Releases, worker: *Worker) void {
        if (releases.waiting.first == null) return;
        const hurried = @atomicLoad(bool, &worker.state.descriptors_short, .acquire);
        if (hurried) @atomicStore(bool, &worker.state.descriptors_short, false, .release);
        const now_ns = os.monotonicNs();
        var next = releases.waiting.first;
        while (next) |file| {
            next = file.release.next;
            if (file.release.due_ns > now_ns and releases.waiting.count <= waiting_max and !hurried) break;
            if (!releases.advance(worker, file)) break;
        }
    }

    /// false: there is no room for any other either.
    fn advance(releases: *Releases, worker: *Worker, file: *File) bool {
        assert(file.handle_list.items.len == 0);
        if (file.failed_errno != 0 or file.rewrite_lsn != 0) {
            releases.remove(file); // with a checkpoint, once it is mended
            return true;
        }
        // What an earlier daemon had accepted may be on its way to it still; or a fence, or another sync is.
        const resting = file.queue.isEmpty() and file.chain_buffer == null and file.deferred.isEmpty();
        if (!resting or file.fences_open > 0 or file.stray_fence or file.syncing or file.queue_syncing) return true;
        if (file.unsynced_lsn != 0) {
            file.errand = .release;
            if (!worker.giveErrand(file)) return false;
            releases.remove(file);
            file.release.syncing = true;
            file.syncing = true;
            file.syncing_lsn = file.unsynced_lsn;
            file.unsynced_lsn = 0;
            return true;
        }
        const route = worker.state.route(file.route);
        // What room a log has left is for what was accepted; and a checkpoint, which makes room, does this too.
        if (route.admission == .log_full or route.failed_errno != 0) return true;
        if (!worker.hasRoom()) return false;
        steps.reached(.file_synced);
        const lsn = worker.logOwn(file, route, .released, &.{}, null) orelse return false;
        // The file has all that stands before it, durably: so it must be durable too, in every flush mode.
        route.sync_wanted = true;
        file.fence_lsn = lsn;
        file.release.lsn = lsn;
        releases.remove(file);
        file.release.list = .logged;
        releases.logged.insert(file);
        return true;
    }

    /// Its sync has come back: errno, or 0.
    pub fn synced(releases: *Releases, worker: *Worker, file: *File, errno: i32) void {
        assert(file.syncing and file.release.syncing);
        file.syncing = false;
        file.release.syncing = false;
        if (errno != 0) {
            // From where this one began; what came since counts no more than that.
            file.unsynced_lsn = file.syncing_lsn;
            worker.syncFailed(file, errno);
        }
        file.syncing_lsn = 0;
        if (file.handle_list.items.len != 0 or file.release.list != .none) return; // opened since
        file.release.list = .waiting;
        file.release.due_ns = 0;
        releases.waiting.insert(file);
    }

    /// Behind the commit.
    pub fn finish(releases: *Releases, worker: *Worker) void {
        var next = releases.logged.first;
        while (next) |file| {
            next = file.release.next;
            if (file.release.lsn > file.log.durableLsn()) continue;
            steps.reached(.file_released);
            releases.remove(file);
            worker.state.counters.add(.files_released_total, 1);
            worker.offerFile(file);
        }
    }

    /// When there is something to do that nothing else would wake the worker for.
    pub fn dueNs(releases: *const Releases) u64 {
        var next = releases.waiting.first;
        if (next == null) return never;
        const now_ns = os.monotonicNs();
        while (next) |file| : (next = file.release.next) {
            if (file.release.due_ns > now_ns) return file.release.due_ns;
        }
        return never;
    }
};

/// The log says, durably, that nothing in it is for the file.
pub fn isReleased(file: *const File) bool {
    return file.release.lsn > file.last_lsn and file.release.lsn <= file.log.durableLsn();
}
