//! Lanes: each a thread that does what may block somewhere, and sleeps while there is nothing to do. What blocks there
//! holds up no other lane, and the worker never waits for one.
//!
//! ```
//! worker ──items with something to do──▶ [inbox]  lane thread  [outbox] ──results──▶ worker
//! ```
//!
//! Both queues have one writer and one reader. There are three sets: one lane per target file system that writes (the
//! disk engine on threads: while a file is in one, its first run is the lane's), one per target file system for what
//! takes longer than a write (rewrite.zig), and one per route that syncs its log (syncs.zig).

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("../os.zig");
const File = @import("../files.zig").File;
const applier = @import("applier.zig");
const Run = applier.Run;

pub const lanes_max = 64;
const queue_length = 4096;
/// Bound of a lane's sleep.
const sleep_ns_max = 100 * std.time.ns_per_ms;

/// One writer, one reader. Bounded; `push` says when it is full.
fn Queue(comptime T: type) type {
    return struct {
        const Self = @This();

        items: [queue_length]T = undefined,
        written: u32 align(128) = 0,
        read: u32 align(128) = 0,

        fn push(queue: *Self, item: T) bool {
            const written = queue.written;
            if (written -% @atomicLoad(u32, &queue.read, .acquire) == queue_length) return false;
            queue.items[written % queue_length] = item;
            @atomicStore(u32, &queue.written, written +% 1, .seq_cst);
            return true;
        }

        fn pop(queue: *Self) ?T {
            const read = queue.read;
            if (read == @atomicLoad(u32, &queue.written, .seq_cst)) return null;
            const item = queue.items[read % queue_length];
            @atomicStore(u32, &queue.read, read +% 1, .release);
            return item;
        }

        fn isEmpty(queue: *const Self) bool {
            return @atomicLoad(u32, &queue.written, .seq_cst) == @atomicLoad(u32, &queue.read, .acquire);
        }
    };
}

/// Worker thread. Lanes for one kind of item.
pub fn Lanes(comptime Item: type) type {
    return struct {
        const Self = @This();

        pub const Result = struct { item: *Item, value: i32 };

        /// What a lane does with an item; as io_uring would answer: bytes, or -errno.
        pub const Perform = *const fn (item: *Item) i32;

        pub const Lane = struct {
            key: u64,
            inbox: Queue(*Item) = .{},
            outbox: Queue(Result) = .{},
            /// Futex. 1: the thread sleeps.
            sleeping: u32 align(128) = 0,
            stopping: bool = false,
            thread: std.Thread = undefined,
            perform: Perform,
            /// The worker's doorbell, rung when results may be waited for.
            doorbell: *u32,

            fn run(lane: *Lane) void {
                while (true) {
                    while (lane.inbox.pop()) |item| {
                        const result = lane.perform(item);
                        // The outbox holds as many as the inbox, and the worker takes before it gives.
                        while (!lane.outbox.push(.{ .item = item, .value = result })) {
                            lane.notify();
                            os.futexWait(&lane.sleeping, 0, std.time.ns_per_ms);
                        }
                    }
                    lane.notify();
                    if (@atomicLoad(bool, &lane.stopping, .acquire)) return;
                    @atomicStore(u32, &lane.sleeping, 1, .seq_cst);
                    if (lane.inbox.isEmpty()) os.futexWait(&lane.sleeping, 1, sleep_ns_max);
                    @atomicStore(u32, &lane.sleeping, 0, .seq_cst);
                }
            }

            fn notify(lane: *Lane) void {
                if (@atomicLoad(u32, lane.doorbell, .seq_cst) != 1) return;
                if (@atomicRmw(u32, lane.doorbell, .Xchg, 0, .seq_cst) == 1) os.futexWake(lane.doorbell, 1);
            }

            fn wake(lane: *Lane) void {
                if (@atomicLoad(u32, &lane.sleeping, .seq_cst) != 1) return;
                if (@atomicRmw(u32, &lane.sleeping, .Xchg, 0, .seq_cst) == 1) os.futexWake(&lane.sleeping, 1);
            }
        };

        allocator: std.mem.Allocator,
        doorbell: *u32,
        perform: Perform,
        lanes: [lanes_max]*Lane = undefined,
        count: u32 = 0,

        /// The lane of a key; where there are `lanes_max`, or no thread is to be had for another, several share one. null: not
        /// even that.
        pub fn laneOf(self: *Self, key: u64) ?*Lane {
            for (self.lanes[0..self.count]) |lane| {
                if (lane.key == key) return lane;
            }
            if (self.count == lanes_max) return self.lanes[key % lanes_max];
            const lane = self.allocator.create(Lane) catch return null;
            lane.* = .{ .key = key, .doorbell = self.doorbell, .perform = self.perform };
            lane.thread = std.Thread.spawn(.{ .stack_size = 256 << 10 }, Lane.run, .{lane}) catch {
                self.allocator.destroy(lane);
                return if (self.count > 0) self.lanes[key % self.count] else null;
            };
            self.lanes[self.count] = lane;
            self.count += 1;
            return lane;
        }

        /// false: the lane's inbox is full; again after results have been taken.
        pub fn give(lane: *Lane, item: *Item) bool {
            return lane.inbox.push(item);
        }

        /// After one or more `give`: lanes that sleep start.
        pub fn wakeAll(self: *Self) void {
            for (self.lanes[0..self.count]) |lane| {
                if (!lane.inbox.isEmpty()) lane.wake();
            }
        }

        pub fn take(self: *Self) ?Result {
            for (self.lanes[0..self.count]) |lane| {
                if (lane.outbox.pop()) |result| return result;
            }
            return null;
        }

        /// Whether `take` would give something. Called after the doorbell is set.
        pub fn anyResult(self: *const Self) bool {
            for (self.lanes[0..self.count]) |lane| {
                if (!lane.outbox.isEmpty()) return true;
            }
            return false;
        }

        /// Ends the threads. Only once nothing is in a lane: one that is stuck in its file system cannot be joined.
        pub fn deinit(self: *Self) void {
            for (self.lanes[0..self.count]) |lane| {
                @atomicStore(bool, &lane.stopping, true, .release);
                lane.wake();
                lane.thread.join();
                self.allocator.destroy(lane);
            }
            self.count = 0;
        }
    };
}

pub const FileLanes = Lanes(File);

/// Of the lanes that write: what is given of the file's queue.
pub fn performRun(file: *File) i32 {
    const run: *Run = file.queue.first.?;
    const raw = switch (run.kind) {
        .append, .write => write: {
            var memory: [applier.vectors_per_write_max]std.posix.iovec_const = undefined;
            const vectors = gather(run, file.queue.given.?, &memory);
            if (run.kind == .write) break :write linux.pwritev(file.fd, vectors.ptr, vectors.len, @intCast(run.offset + run.done));
            break :write linux.pwritev2(file.fd, vectors.ptr, vectors.len, @bitCast(applier.at_own_position), linux.RWF.APPEND);
        },
        .truncate => linux.ftruncate(file.fd, @intCast(run.offset)),
        .allocate => linux.fallocate(file.fd, @bitCast(run.argument), @intCast(run.offset), @intCast(run.length)),
        .sync => linux.fdatasync(file.sync_fd),
    };
    return switch (os.check(raw)) {
        .value => |value| {
            if (run.kind == .append) run.landed_end = applier.positionOf(file.fd);
            if (run.hasPayload()) sendAhead(file, value);
            return @intCast(value);
        },
        .errno => |errno| -errno,
    };
}

/// The bytes of all runs from `first` to `last`.
fn gather(first: *const Run, last: *const Run, memory: *[applier.vectors_per_write_max]std.posix.iovec_const) []const std.posix.iovec_const {
    if (first == last) return first.vectors[0..first.vector_count];
    var count: usize = 0;
    var run = first;
    while (true) : (run = run.next.?) {
        @memcpy(memory[count..][0..run.vector_count], run.vectors[0..run.vector_count]);
        count += run.vector_count;
        // What is behind the last one is the worker's to change.
        if (run == last) return memory[0..count];
    }
}

/// What a file takes goes to its disk by and by, in pieces that a commit of the log can stand behind: a checkpoint that finds
/// all of it in the page cache keeps the disk to itself for as long as that takes to write.
const send_ahead_bytes = 1 << 20;

fn sendAhead(file: *File, written_bytes: u64) void {
    file.unsent_bytes += written_bytes;
    if (file.unsent_bytes < send_ahead_bytes) return;
    file.unsent_bytes = 0;
    const begin_writing = 2; // SYNC_FILE_RANGE_WRITE
    // Only begins; what becomes of it is the sync's to say.
    _ = linux.syscall4(.sync_file_range, @intCast(file.fd), 0, 0, begin_writing);
}
