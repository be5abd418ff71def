//! Brings logged operations into their target files, so that a file system that stalls never stops the worker.
//! Worker thread only.
//!
//! Each file has a queue of runs; one run of a file is under way at a time, so writes to one file keep their order.
//! Adjacent writes are merged into one run before they are handed over. Short writes are continued.
//!
//! Two engines do the writing, behind this one interface: lanes (a thread per file system, pwritev) and io_uring.
//! A small buffered write costs 5 µs through io_uring, which punts it to a kernel thread, and 0.8 µs in pwritev;
//! docs/benchmarks.md has both side by side.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("../os.zig");
const Uring = @import("../uring.zig").Uring;
const Lanes = @import("lanes.zig").Lanes;
const File = @import("../files.zig").File;
const Buffer = @import("../buffers.zig").Buffer;

/// One contiguous write, or one change of a file's size. Its bytes lie in the log buffer that it came from,
/// which stays untouched until the run is done.
pub const Run = struct {
    kind: enum { write, truncate, allocate },
    argument: u32,
    offset: u64,
    length: u64,
    /// Of `length`, already in the file.
    done: u64,
    vectors: [*]std.posix.iovec_const,
    vector_count: u32,
    first_lsn: u64,
    /// Whose memory its bytes are; null: they are its own (see `park`).
    buffer: ?*Buffer,
    next: ?*Run,
    /// The target refused it: it no longer holds up the applied position, but its bytes are kept.
    refused: bool,
};

pub const parked_bytes_max: usize = 64 << 20;
pub const vectors_per_run_max: u32 = 512;

pub const Queue = struct {
    first: ?*Run = null,
    last: ?*Run = null,
    in_flight: bool = false,

    pub fn isEmpty(queue: *const Queue) bool {
        return queue.first == null;
    }
};

/// What the worker does with the applier's news.
pub const Sink = struct {
    context: *anyopaque,
    /// A run is in its file.
    applied: *const fn (context: *anyopaque, run: *Run) void,
    /// The target refused with this errno: all that is queued waits until `retry`.
    refused: *const fn (context: *anyopaque, file: *File, errno: i32) void,
    /// What it had refused is in the file after all.
    recovered: *const fn (context: *anyopaque, file: *File) void,
};

pub const EngineKind = enum { lanes, io_uring };

pub const Engine = union(EngineKind) {
    lanes: Lanes,
    io_uring: *Uring,
};

pub const Applier = struct {
    engine: Engine,
    sink: Sink,
    allocator: std.mem.Allocator,
    in_flight: u32 = 0,
    /// Bytes of refused runs that were copied out of their buffers.
    parked_bytes: usize = 0,
    /// Some file's next run could not be handed over because a queue was full.
    starved: bool = false,

    pub fn enqueue(file: *File, run: *Run) void {
        run.next = null;
        if (file.queue.last) |last| last.next = run else file.queue.first = run;
        file.queue.last = run;
        const buffer = run.buffer.?;
        buffer.pinned_runs += 1;
        // A file that refuses already holds up nobody's position.
        if (file.failed_errno != 0) run.refused = true else buffer.pending_runs += 1;
    }

    /// Hands over the file's next run, unless one is under way. Nothing starts before `flush`.
    pub fn start(applier: *Applier, file: *File) void {
        if (file.queue.in_flight or (file.failed_errno != 0 and !file.retrying)) return;
        const run = file.queue.first orelse return;
        const given = switch (applier.engine) {
            .lanes => Lanes.give(file.lane.?, file),
            .io_uring => |uring| giveToUring(uring, file, run),
        };
        if (!given) {
            applier.starved = true;
            return;
        }
        file.queue.in_flight = true;
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
            .write => {
                entry.opcode = .WRITEV;
                entry.off = run.offset + run.done;
                entry.addr = @intFromPtr(run.vectors);
                entry.len = run.vector_count;
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
        }
        entry.fd = file.fd;
        entry.user_data = @intFromPtr(file);
        return true;
    }

    /// One run has come back: `result` is bytes, or -errno. The file's next one is handed over.
    pub fn completed(applier: *Applier, file: *File, result: i32) void {
        assert(file.queue.in_flight);
        file.queue.in_flight = false;
        applier.in_flight -= 1;
        const run = file.queue.first.?;
        if (result < 0) {
            const errno = -result;
            const again = errno == @intFromEnum(linux.E.AGAIN) or errno == @intFromEnum(linux.E.INTR);
            if (!again) applier.refuse(file, errno);
        } else if (run.kind != .write) {
            applier.pop(file, run);
        } else if (result == 0 and run.length > run.done) {
            // A regular file that takes no byte and gives no error is broken.
            applier.refuse(file, @intFromEnum(linux.E.IO));
        } else {
            advance(run, @intCast(result));
            if (run.done == run.length) applier.pop(file, run);
        }
        applier.start(file);
    }

    /// Tries a refused file again.
    pub fn retry(applier: *Applier, file: *File) void {
        assert(file.failed_errno != 0);
        if (file.queue.in_flight) return;
        file.retrying = true;
        applier.start(file);
    }

    fn pop(applier: *Applier, file: *File, run: *Run) void {
        file.queue.first = run.next;
        if (run.next == null) file.queue.last = null;
        applier.sink.applied(applier.sink.context, run);
        if (run.buffer) |buffer| {
            if (!run.refused) buffer.pending_runs -= 1;
            buffer.pinned_runs -= 1;
        } else applier.unpark(run);
        if (file.retrying and file.queue.isEmpty()) {
            file.retrying = false;
            file.failed_errno = 0;
            applier.sink.recovered(applier.sink.context, file);
        }
    }

    fn refuse(applier: *Applier, file: *File, errno: i32) void {
        const known = file.failed_errno != 0;
        file.failed_errno = errno;
        file.retrying = false;
        if (known) return; // tried again in vain: no news, and nothing new was queued
        var next = file.queue.first;
        while (next) |run| : (next = run.next) {
            if (run.refused) continue;
            run.refused = true;
            run.buffer.?.pending_runs -= 1;
        }
        applier.park(file);
        applier.sink.refused(applier.sink.context, file, errno);
    }

    /// Gives refused runs memory of their own, so that a full disk does not keep the log buffers that everybody
    /// needs. Bounded: what goes beyond stays in its buffer.
    fn park(applier: *Applier, file: *File) void {
        var link = &file.queue.first;
        while (link.*) |run| : (link = &link.*.?.next) {
            const bytes = run.length - run.done;
            if (run.buffer == null or run.kind != .write or applier.parked_bytes + bytes > parked_bytes_max) continue;
            const parked = applier.allocator.create(Parked) catch return;
            const memory = applier.allocator.alloc(u8, bytes) catch {
                applier.allocator.destroy(parked);
                return;
            };
            var at: usize = 0;
            for (run.vectors[0..run.vector_count]) |vector| {
                @memcpy(memory[at..][0..vector.len], vector.base[0..vector.len]);
                at += vector.len;
            }
            assert(at == bytes);
            parked.* = .{ .run = run.*, .vector = .{ .base = memory.ptr, .len = memory.len }, .memory = memory };
            parked.run.offset += run.done;
            parked.run.length = bytes;
            parked.run.done = 0;
            parked.run.vectors = @ptrCast(&parked.vector);
            parked.run.vector_count = 1;
            parked.run.buffer = null;
            applier.parked_bytes += bytes;
            run.buffer.?.pinned_runs -= 1;
            link.* = &parked.run;
            if (file.queue.last == run) file.queue.last = &parked.run;
        }
    }

    fn unpark(applier: *Applier, run: *Run) void {
        const parked: *Parked = @fieldParentPtr("run", run);
        applier.parked_bytes -= parked.memory.len;
        applier.allocator.free(parked.memory);
        applier.allocator.destroy(parked);
    }

    const Parked = struct { run: Run, vector: std.posix.iovec_const, memory: []u8 };

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
