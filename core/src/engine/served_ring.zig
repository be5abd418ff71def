//! A ring that the worker serves, with everything that belongs to it alone: its positions, its rows and handles,
//! and how far the worker is in it. Most daemons serve one; other users, and clients that must share with nobody,
//! have rings of their own.
//!
//! Made by the starting or the control thread, given to the worker by a request, freed by the control thread once
//! the worker has let go of it.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const os = @import("os.zig");
const Consumer = @import("consumer.zig").Consumer;
const Counters = @import("counters.zig").Counters;
const Publisher = @import("publisher.zig").Publisher;
const ring_memory = @import("ring_memory.zig");
const RingMemory = ring_memory.RingMemory;
const File = @import("files.zig").File;
const Failure = @import("failure.zig").Failure;
const Waiting = @import("waiting.zig").Waiting;
const List = @import("waiting.zig").List;

/// As many as one FUTEX_WAITV takes, less the worker's own doorbell.
pub const rings_max = 127;

/// Session number of rows whose session is gone while their thread lives.
pub const orphaned: u64 = std.math.maxInt(u64);

pub const Handle = struct {
    file: ?*File = null,
    session: u64 = 0,
};

/// A handle, by the ring whose positions memory it stands in.
pub const HandleRef = struct {
    ring: *ServedRing,
    index: u32,

    pub fn state(handle: HandleRef) *positions.HandleState {
        return handle.ring.publisher.handle(handle.index);
    }

    pub fn session(handle: HandleRef) u64 {
        return handle.ring.handles[handle.index].session;
    }
};

/// What the worker knows of one route in one ring.
pub const Line = struct {
    /// An operation of this route was seen since the last publication.
    touched: bool = false,
    /// All operations of this route that the worker has seen are below.
    seen_position: u64 = 0,
    /// Barriers seen before the batch's first record may be answered before the commit.
    first_record_position: u64 = 0,
    /// Published as logged when the sync that is under way was begun.
    covered_position: u64 = 0,
    /// In the files, as far as its buffers say.
    applied_position: u64 = 0,
    barriers_before_record: bool = false,
    /// But not from here on: a barrier that has to wait for what other rings hold, which may be in this batch.
    shared_barrier_position: u64 = no_gate,
    /// No position is published beyond: a barrier that waits until other rings have been looked at.
    gate_position: u64 = no_gate,
    /// Nor beyond this: an operation that waits for its file's fence, and is in no buffer yet.
    deferred_position: u64 = no_gate,

    pub const no_gate: u64 = std.math.maxInt(u64);

    pub fn limit(line: *const Line) u64 {
        return @min(line.gate_position, line.deferred_position);
    }
};

pub const ServedRing = struct {
    /// The bit by which buffers know it.
    index: u7,
    memory: RingMemory,
    view: ring.View,
    /// What the log calls it. Read once: nothing that a client writes later changes it.
    uuid: [16]u8,
    publisher: Publisher,

    // Control thread.
    /// Whose sessions it serves.
    uid: u32,
    sessions: u32 = 0,
    /// The worker has been asked to let go of it.
    leaving: bool = false,
    /// No session is open in it, nor will one be. Set by the control thread.
    deserted: bool = false,
    handle_used: std.StaticBitSet(positions.handles_max) = .initEmpty(),
    next_handle: u32 = 0,

    taken_over: bool = false,
    /// Session that each row was given to; 0: free. Given by the control thread, freed by the worker.
    row_sessions: [ring.producer_rows]u64 = @splat(0),

    // Worker thread.
    /// Somebody has cut its file short: nothing is taken from it any more.
    lost: bool = false,
    consumer: Consumer,
    /// Slots were given back, or credits raised, and no producer has been woken for it yet.
    has_more_room: bool = false,
    handles: []Handle,
    lines: []Line,
    /// One for each slot; see waiting.zig.
    waiting: []Waiting,
    /// Accepted before this daemon had the ring, for files that it does not know by the names that they had then: each
    /// is done when its client registers the file again.
    orphans: List = .{},
    /// Files that are registered again, by those names.
    aliases: std.AutoHashMapUnmanaged(u64, *File) = .empty,
    /// Operations below this position were accepted by an earlier daemon: their handles are not in our table.
    recovery_head: u64 = 0,
    recovery_over: bool = false,
    /// Positions of this ring that the log has had from earlier daemons.
    logged_positions: std.AutoHashMapUnmanaged(u64, void) = .empty,
    /// Rows whose session is gone while their thread lives.
    rows_to_free: u32 = 0,
    /// The one route that operations came for lately (see Worker.publishCredits), and another one came between.
    sole_candidate: u32 = positions.no_sole_route,
    sole_disturbed: bool = false,
    sole_since_ns: u64 = 0,

    /// Of `memory`, which is the new ring's from here on.
    pub fn create(allocator: std.mem.Allocator, memory: RingMemory, index: u7, counters: *Counters, failure: *Failure) error{Failed}!*ServedRing {
        const served = allocator.create(ServedRing) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for a ring's tables", .{});
        errdefer allocator.destroy(served);
        var publisher = try Publisher.init(failure);
        errdefer publisher.deinit();
        // Pages of zeros, which are what an empty table holds: they cost nothing until they are used.
        const handles = try zeroed(Handle, positions.handles_max, failure);
        errdefer release(Handle, handles);
        const waiting = try zeroed(Waiting, ring.slot_count, failure);
        errdefer release(Waiting, waiting);
        const lines = allocator.alloc(Line, positions.routes_max) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for a ring's routes", .{});
        @memset(lines, .{});
        served.* = .{
            .index = index,
            .memory = memory,
            .view = memory.view,
            .uuid = uuidOf(memory.view),
            .publisher = publisher,
            .uid = memory.uid,
            .consumer = Consumer.init(memory.view, counters),
            .handles = handles,
            .lines = lines,
            .waiting = waiting,
        };
        return served;
    }

    /// What an earlier daemon left in the ring. Before anybody is let in: who gets a row of it then keeps it.
    pub fn takeOver(served: *ServedRing) void {
        assert(!served.taken_over);
        served.taken_over = true;
        // Whoever attached to an earlier daemon must attach anew: its handles are not in our table. Every claim
        // that was made before its owner could see that stands below the head as it is read then.
        for (0..ring.producer_rows) |row| {
            @atomicStore(u64, &served.view.producerRow(@intCast(row)).session, 0, .seq_cst);
        }
        served.recovery_head = served.headPosition();
        served.consumer.abortDeadClaims(served.recovery_head);
        for (&served.row_sessions, 0..) |*session, row| {
            const entry = served.view.producerRow(@intCast(row));
            if (ring_memory.ownerOf(entry) == .living) {
                session.* = orphaned;
                served.rows_to_free += 1;
            } else ring_memory.initMutex(entry);
        }
    }

    pub fn destroy(served: *ServedRing, allocator: std.mem.Allocator) void {
        served.memory.close();
        served.publisher.deinit();
        release(Handle, served.handles);
        release(Waiting, served.waiting);
        allocator.free(served.lines);
        served.logged_positions.deinit(allocator);
        served.aliases.deinit(allocator);
        allocator.destroy(served);
    }

    fn zeroed(comptime T: type, count: usize, failure: *Failure) error{Failed}![]T {
        return switch (os.check(linux.mmap(null, count * @sizeOf(T), linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true }, -1, 0))) {
            .value => |address| @as([*]T, @ptrFromInt(address))[0..count],
            .errno => |errno| failure.set(errno, "cannot map {d} bytes for a ring's tables: {s}", .{ count * @sizeOf(T), Failure.nameOf(errno) }),
        };
    }

    fn release(comptime T: type, memory: []T) void {
        _ = linux.munmap(@ptrCast(@alignCast(memory.ptr)), memory.len * @sizeOf(T));
    }

    pub fn forgetAliases(served: *ServedRing, file: *const File) void {
        var entries = served.aliases.iterator();
        while (entries.next()) |entry| {
            if (entry.value_ptr.* == file) served.aliases.removeByPtr(entry.key_ptr);
        }
    }

    pub fn waitingAt(served: *ServedRing, position: u64) *Waiting {
        return &served.waiting[ring.slotIndex(position)];
    }

    pub fn headPosition(served: *ServedRing) u64 {
        return served.consumer.headPosition();
    }

    pub fn sessionOfRow(served: *ServedRing, row: u32) u64 {
        return if (row < ring.producer_rows) @atomicLoad(u64, &served.row_sessions[row], .acquire) else 0;
    }

    /// All operations of one session below `position` are seen, none of its claims is passed and open.
    pub fn isBehindOf(served: *ServedRing, position: u64, session: u64) bool {
        if (served.lost) return true;
        const consumer = &served.consumer;
        if (!consumer.hasSeen(position)) return false;
        if (consumer.leave_open) return true;
        for (consumer.passed[0..consumer.passed_count]) |passed| {
            if (passed < position and served.sessionOfRow(served.view.loadState(passed).owner) == session) return false;
        }
        return true;
    }
};

/// What the log calls a ring. Of another user's, something that depends on the user: it cannot be made to go for one
/// of ours.
pub fn uuidOf(view: ring.View) [16]u8 {
    const header = view.header();
    const uuid = header.uuid;
    const owner_uid = header.owner_uid;
    if (owner_uid == linux.geteuid()) return uuid;
    var hash = std.crypto.hash.Blake3.init(.{});
    hash.update(&uuid);
    hash.update(std.mem.asBytes(&owner_uid));
    var derived: [16]u8 = undefined;
    hash.final(&derived);
    return derived;
}

comptime {
    assert(@sizeOf(Handle) == 16 or @sizeOf(usize) != 8);
}
