//! Brings logged operations into their target files, so that a file system that stalls never stops the worker.
//! Worker thread only.
//!
//! Each file has a queue of runs; one write of a file is under way at a time, so writes to one file keep their order.
//! Adjacent writes are merged into one run before they are queued, and lanes are given all adjacent runs that are queued as
//! one write. Short writes are continued.
//!
//! Two engines do the writing, behind this one interface: lanes (a thread per file system, pwritev) and io_uring.
//! A small buffered write costs 5 µs through io_uring, which punts it to a kernel thread, and 0.8 µs in pwritev;
//! docs/benchmarks.md has both side by side.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("../os.zig");
const Uring = @import("../uring.zig").Uring;
const FileLanes = @import("lanes.zig").FileLanes;
const File = @import("../files.zig").File;
const Buffer = @import("../buffers.zig").Buffer;

/// One contiguous write, one change of a file's size, or a sync. Its bytes lie in the log buffer that it came from,
/// which stays untouched until the run is done.
pub const Run = struct {
    kind: enum {
        write,
        /// A write whose offset is where the worker took the file's end to be. It goes to where the end is: what
        /// another program has appended meanwhile is not overwritten.
        append,
        truncate,
        allocate,
        sync,
    },
    argument: u32,
    offset: u64,
    /// An append: where its last write ended.
    landed_end: u64 = 0,
    length: u64,
    /// Of `length`, already in the file.
    done: u64,
    vectors: [*]std.posix.iovec_const,
    vector_count: u32,
    first_lsn: u64,
    last_lsn: u64,
    /// Whose memory its bytes are; null for a sync.
    buffer: ?*Buffer,
    next: ?*Run,

    pub fn hasPayload(run: *const Run) bool {
        return run.kind == .write or run.kind == .append;
    }

    pub const sync = Run{ .kind = .sync, .argument = 0, .offset = 0, .length = 0, .done = 0, .vectors = undefined, .vector_count = 0, .first_lsn = 0, .last_lsn = 0, .buffer = null, .next = null };
};

pub const vectors_per_run_max: u32 = 512;
/// What one system call takes (IOV_MAX).
pub const vectors_per_write_max: u32 = 1024;

/// As the offset of a write: where the descriptor's own position is, which moves with it. Nothing else uses it.
pub const at_own_position: u64 = std.math.maxInt(u64);

/// Where an append to `fd` has ended.
pub fn positionOf(fd: i32) u64 {
    return os.check(linux.lseek(fd, 0, linux.SEEK.CUR)).ok() orelse 0;
}

pub const Queue = struct {
    first: ?*Run = null,
    last: ?*Run = null,
    /// The last run of those that are under way together, from the first on; null: none is.
    given: ?*Run = null,

    pub fn isEmpty(queue: *const Queue) bool {
        return queue.first == null;
    }

    pub fn inFlight(queue: *const Queue) bool {
        return queue.given != null;
    }

    /// Up to where the first run and those behind it are one contiguous write.
    fn mergeable(queue: *const Queue) *Run {
        var run = queue.first.?;
        var vectors = run.vector_count;
        while (run.hasPayload()) {
            const next = run.next orelse break;
            if (next.kind != run.kind or next.offset != run.offset + run.length) break;
            if (vectors + next.vector_count > vectors_per_write_max) break;
            vectors += next.vector_count;
            run = next;
        }
        return run;
    }
};

/// What the worker does with the applier's news.
pub const Sink = struct {
    context: *anyopaque,
    /// A run is in its file.
    applied: *const fn (context: *anyopaque, run: *Run) void,
    /// Somebody else has changed the file's end: `written` bytes at `offset` of it were meant for `meant`.
    strayed: *const fn (context: *anyopaque, file: *File, meant: u64, offset: u64, written: u64) void,
    /// The target refused with this errno: what is queued is written from the log once that is possible again.
    refused: *const fn (context: *anyopaque, file: *File, errno: i32) void,
    /// A sync of the file's queue is done, with this errno or 0.
    synced: *const fn (context: *anyopaque, file: *File, errno: i32) void,
};

pub const EngineKind = enum { lanes, io_uring };

pub const Engine = union(EngineKind) {
    lanes: FileLanes,
    io_uring: *Uring,
};

pub const Applier = struct {
    engine: Engine,
    sink: Sink,
    in_flight: u32 = 0,
    /// Some file's next run could not be handed over because a queue was full.
    starved: bool = false,

    pub fn enqueue(file: *File, run: *Run) void {
        run.next = null;
        if (run.kind != .sync) file.queue_synced = false;
        if (file.rewrite_lsn != 0) {
            // In order, or not at all: it is written from the log, behind what is missing there.
            assert(run.kind != .sync and run.first_lsn >= file.rewrite_lsn);
            return;
        }
        if (file.queue.last) |last| last.next = run else file.queue.first = run;
        file.queue.last = run;
        if (run.buffer) |buffer| buffer.pending_runs += 1;
    }

    /// Once all that is queued is in the file: sync it. See `Sink.synced`, and `File.queue_synced`.
    pub fn enqueueSync(file: *File) void {
        assert(!file.queue_syncing and !file.syncing and file.rewrite_lsn == 0);
        file.queue_syncing = true;
        file.sync_run = .sync;
        enqueue(file, &file.sync_run);
    }

    /// Hands over what is next of the file, unless something is under way. Nothing starts before `flush`.
    pub fn start(applier: *Applier, file: *File) void {
        if (file.queue.inFlight() or file.rewrite_lsn != 0) return;
        const run = file.queue.first orelse return;
        file.queue.given = switch (applier.engine) {
            .lanes => file.queue.mergeable(),
            .io_uring => run,
        };
        const given = switch (applier.engine) {
            .lanes => FileLanes.give(file.lane.?, file),
            .io_uring => |uring| giveToUring(uring, file, run),
        };
        if (!given) {
            file.queue.given = null;
            applier.starved = true;
            return;
        }
        applier.in_flight += 1;
    }

    /// Lets the engine begin with what was handed over.
    pub fn flush(applier: *Applier) void {
        switch (applier.engine) {
            .lanes => |*lanes| lanes.wakeAll(),
            .io_uring => |uring| if (uring.unsubmitted > 0) uring.submit(),
        }
    }

    fn giveToUring(uring: *Uring, file: *File, run: *Run) bool {
        const entry = uring.prepare() orelse blk: {
            uring.submit();
            break :blk uring.prepare() orelse return false;
        };
        switch (run.kind) {
            .write, .append => {
                entry.opcode = .WRITEV;
                entry.off = run.offset + run.done;
                entry.addr = @intFromPtr(run.vectors);
                entry.len = run.vector_count;
                if (run.kind == .append) {
                    entry.off = at_own_position;
                    entry.rw_flags = linux.RWF.APPEND;
                }
            },
            .truncate => {
                entry.opcode = .FTRUNCATE;
                entry.off = run.offset;
            },
            .allocate => {
                entry.opcode = .FALLOCATE;
                entry.off = run.offset;
                entry.addr = run.length;
                entry.len = run.argument;
            },
            .sync => {
                entry.opcode = .FSYNC;
                entry.rw_flags = linux.IORING_FSYNC_DATASYNC;
            },
        }
        entry.fd = if (run.kind == .sync) file.sync_fd else file.fd;
        entry.user_data = @intFromPtr(file);
        return true;
    }

    /// What was given has come back: `result` is bytes, or -errno. What is next of the file is handed over.
    pub fn completed(applier: *Applier, file: *File, result: i32) void {
        const given = file.queue.given.?;
        file.queue.given = null;
        applier.in_flight -= 1;
        const run = file.queue.first.?;
        const errno: i32 = if (result < 0) -result else 0;
        const again = errno == @intFromEnum(linux.E.AGAIN) or errno == @intFromEnum(linux.E.INTR);
        if (file.rewrite_lsn != 0) {
            // Given up while it was under way: whatever became of it, it is written from the log.
            const synced_only = run.kind == .sync;
            assert(file.queue.last == given);
            while (file.queue.first) |each| pop(file, each);
            if (synced_only) applier.synced(file, errno);
        } else if (run.kind == .sync) {
            if (!again) {
                pop(file, run);
                applier.synced(file, errno);
            }
        } else if (errno != 0) {
            if (!again) applier.refuse(file, errno);
        } else if (!run.hasPayload()) {
            applier.apply(file, run);
        } else if (result == 0 and run.length > run.done) {
            // A regular file that takes no byte and gives no error is broken.
            applier.refuse(file, @intFromEnum(linux.E.IO));
        } else {
            if (run.kind == .append) applier.noteLanding(file, run, @intCast(result));
            applier.advanceAll(file, given, @intCast(result));
        }
        applier.start(file);
    }

    /// So many bytes of the first run, and of those behind it up to `given`, are in the file.
    fn advanceAll(applier: *Applier, file: *File, given: *const Run, written: u64) void {
        var rest = written;
        while (file.queue.first) |run| {
            const part = @min(rest, run.length - run.done);
            advance(run, part);
            rest -= part;
            if (run.done < run.length) break;
            const was_last = run == given;
            applier.apply(file, run);
            if (was_last) break;
        }
        assert(rest == 0);
    }

    fn noteLanding(applier: *Applier, file: *File, run: *Run, written: u64) void {
        if (applier.engine == .io_uring) run.landed_end = positionOf(file.fd);
        const offset = run.landed_end -| written;
        const meant = run.offset + run.done;
        if (offset != meant) applier.sink.strayed(applier.sink.context, file, meant, offset, written);
    }

    fn apply(applier: *Applier, file: *File, run: *Run) void {
        pop(file, run);
        applier.sink.applied(applier.sink.context, run);
    }

    fn synced(applier: *Applier, file: *File, errno: i32) void {
        file.queue_syncing = false;
        file.queue_synced = errno == 0 and file.queue.isEmpty() and file.rewrite_lsn == 0;
        applier.sink.synced(applier.sink.context, file, errno);
    }

    fn pop(file: *File, run: *Run) void {
        assert(file.queue.first == run);
        file.queue.first = run.next;
        if (run.next == null) file.queue.last = null;
        if (run.buffer) |buffer| buffer.pending_runs -= 1;
    }

    fn refuse(applier: *Applier, file: *File, errno: i32) void {
        giveUp(file, file.queue.first.?.first_lsn);
        applier.sink.refused(applier.sink.context, file, errno);
    }

    /// The file is to be written from the log, from this LSN on or from where its queue begins: the queue's memory is
    /// given back (but for what is under way), so that a target that takes nothing holds up nobody else.
    pub fn giveUp(file: *File, first_lsn: u64) void {
        var rewrite_lsn = if (file.rewrite_lsn != 0) @min(file.rewrite_lsn, first_lsn) else first_lsn;
        var next = file.queue.first;
        while (next) |run| : (next = run.next) {
            if (run.kind != .sync) rewrite_lsn = @min(rewrite_lsn, run.first_lsn);
        }
        assert(rewrite_lsn > 0);
        file.rewrite_lsn = rewrite_lsn;
        const kept = file.queue.given;
        next = if (kept) |run| run.next else file.queue.first;
        while (next) |run| : (next = run.next) {
            if (run.buffer) |buffer| buffer.pending_runs -= 1;
            if (run.kind == .sync) file.queue_syncing = false;
        }
        if (kept) |run| run.next = null else file.queue.first = null;
        file.queue.last = kept;
    }

    fn advance(run: *Run, written: u64) void {
        run.done += written;
        assert(run.done <= run.length);
        var rest: usize = @intCast(written);
        while (rest > 0) {
            const vector = &run.vectors[0];
            const taken = @min(rest, vector.len);
            vector.base += taken;
            vector.len -= taken;
            rest -= taken;
            if (vector.len == 0 and run.vector_count > 1) {
                run.vectors += 1;
                run.vector_count -= 1;
            }
        }
    }
};
