//! Log buffers: where a group is built, from which it is committed to the log and then applied to the files.
//! A fixed number of them; when all are taken the worker stops taking from the ring, and producers wait.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const Group = @import("wal/group.zig").Group;
const applier = @import("disk/applier.zig");
const Run = applier.Run;
const File = @import("files.zig").File;
const Failure = @import("failure.zig").Failure;
const ServedRing = @import("served_ring.zig").ServedRing;
const rings_max = @import("served_ring.zig").rings_max;

pub const buffer_count = 32;
/// So many a route may always have on their way to its targets; more, while half of all are free.
pub const share_min = 2;
/// Room for a batch of a quarter of the ring and one longest record behind it.
pub const buffer_bytes = 4 << 20;
/// A batch takes no more records than the ring has slots, whatever their sizes.
pub const records_max = ring.slot_count;

/// One logged operation on a file, with its payload where it lies in the log buffer.
pub const Record = struct {
    kind: @FieldType(Run, "kind"),
    argument: u32,
    offset: u64,
    length: u64,
    payload: []const u8,
    lsn: u64,
    /// The file's next record in this buffer, or `end_of_chain`.
    next: u32,
};

const Settling = struct { ring: *ServedRing, position: u64 };

pub const end_of_chain: u32 = std.math.maxInt(u32);

pub const Buffer = struct {
    group: Group,
    memory: []align(4096) u8,
    /// The records that go to files, in the order of the ring; each file's are chained.
    records: [records_max]Record,
    record_count: u32,
    /// The files that have records here, in the order of their chains; a file may come more than once.
    files: [records_max]*File,
    file_count: u32,
    /// Of `files`, those whose chain is built into runs, and where the last `buildRuns` began.
    built_count: u32,
    built_before: u32,
    /// Of `files`, those who have been told that the log refuses this buffer.
    reported_count: u32,
    /// The same records as the applier takes them: sorted by file, adjacent writes merged.
    vectors: [records_max]std.posix.iovec_const,
    vector_count: u32,
    runs: [records_max]Run,
    run_count: u32,
    route: u32,
    last_lsn: u64,
    /// When the oldest of its records was made, by the producer's clock.
    oldest_ns: u64,
    /// The route's positions, one for each ring, when this buffer is logged and applied; where `ends_set` says so.
    end_positions: [rings_max]u64,
    ends_set: std.StaticBitSet(rings_max),
    logged: bool,
    /// Runs that hold up the applied position, and need this buffer's bytes.
    pending_runs: u32,
    /// Positions of passed claims in it, to be settled when it is applied.
    settle: [records_max]Settling,
    settle_count: u32,
    next: ?*Buffer,

    /// Adds a record, and chains it to the file's earlier ones in this buffer.
    pub fn add(buffer: *Buffer, file: *File, record: Record) void {
        const index = buffer.record_count;
        buffer.records[index] = record;
        buffer.records[index].next = end_of_chain;
        buffer.record_count += 1;
        if (file.chain_buffer == buffer) {
            buffer.records[file.chain_last].next = index;
        } else {
            file.chain_buffer = buffer;
            file.chain_first = index;
            buffer.files[buffer.file_count] = file;
            buffer.file_count += 1;
        }
        file.chain_last = index;
    }

    /// Turns the chains that are new into runs, queued at their files. Whether there were any.
    pub fn buildRuns(buffer: *Buffer) bool {
        buffer.built_before = buffer.built_count;
        buffer.built_count = buffer.file_count;
        for (buffer.newFiles()) |file| {
            assert(file.chain_buffer == buffer);
            file.chain_buffer = null;
            var run: ?*Run = null;
            var index = file.chain_first;
            while (index != end_of_chain) : (index = buffer.records[index].next) {
                const record = &buffer.records[index];
                const joins = if (run) |last| last.kind == record.kind and last.hasPayload() and
                    last.offset + last.length == record.offset and last.vector_count < applier.vectors_per_run_max else false;
                if (!joins) {
                    if (run) |finished| applier.Applier.enqueue(file, finished);
                    run = &buffer.runs[buffer.run_count];
                    buffer.run_count += 1;
                    run.?.* = .{
                        .kind = record.kind,
                        .argument = record.argument,
                        .offset = record.offset,
                        .length = 0,
                        .done = 0,
                        .vectors = buffer.vectors[buffer.vector_count..].ptr,
                        .vector_count = 0,
                        .first_lsn = record.lsn,
                        .last_lsn = record.lsn,
                        .buffer = buffer,
                        .next = null,
                    };
                }
                const current = run.?;
                current.length += record.length;
                current.last_lsn = record.lsn;
                if (current.hasPayload()) {
                    buffer.vectors[buffer.vector_count] = .{ .base = record.payload.ptr, .len = record.payload.len };
                    buffer.vector_count += 1;
                    current.vector_count += 1;
                }
            }
            if (run) |finished| applier.Applier.enqueue(file, finished);
        }
        return buffer.built_count > buffer.built_before;
    }

    /// The files for which the last `buildRuns` made runs.
    pub fn newFiles(buffer: *const Buffer) []const *File {
        return buffer.files[buffer.built_before..buffer.built_count];
    }

    /// Room for one more longest record, and a fence before it.
    pub fn hasRoom(buffer: *const Buffer) bool {
        return buffer.record_count < records_max and
            buffer.group.capacity_bytes - buffer.group.length_bytes >= wal.recordBytes(wal.payload_bytes_max) + wal.recordBytes(0);
    }

    /// A passed claim in this buffer: its slot is released when the buffer is applied.
    pub fn settleLater(buffer: *Buffer, served: *ServedRing, position: u64) void {
        buffer.settle[buffer.settle_count] = .{ .ring = served, .position = position };
        buffer.settle_count += 1;
    }

    pub fn setEnd(buffer: *Buffer, served: *const ServedRing, position: u64) void {
        buffer.end_positions[served.index] = position;
        buffer.ends_set.set(served.index);
    }

    pub fn isApplied(buffer: *const Buffer) bool {
        return buffer.logged and buffer.pending_runs == 0;
    }
};

pub const Buffers = struct {
    all: []Buffer,
    memory: []align(std.heap.page_size_min) u8,
    free: ?*Buffer,
    free_count: u32,

    pub fn init(allocator: std.mem.Allocator, failure: *Failure) error{Failed}!Buffers {
        const bytes = buffer_count * buffer_bytes;
        // Touched as it is used: an idle daemon holds none of it in memory.
        const memory = switch (os.check(linux.mmap(null, bytes, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .PRIVATE, .ANONYMOUS = true, .NORESERVE = true }, -1, 0))) {
            .value => |address| @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..bytes],
            .errno => |errno| return failure.set(errno, "cannot map {d} bytes for log buffers: {s}", .{ bytes, Failure.nameOf(errno) }),
        };
        const all = allocator.alloc(Buffer, buffer_count) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for {d} log buffers", .{buffer_count});
        var buffers = Buffers{ .all = all, .memory = memory, .free = null, .free_count = 0 };
        for (all, 0..) |*buffer, i| {
            buffer.memory = @alignCast(memory[i * buffer_bytes ..][0..buffer_bytes]);
            buffer.group = Group.init(buffer.memory);
            buffer.next = buffers.free;
            buffers.free = buffer;
            buffers.free_count += 1;
        }
        return buffers;
    }

    pub fn deinit(buffers: *Buffers, allocator: std.mem.Allocator) void {
        _ = linux.munmap(buffers.memory.ptr, buffers.memory.len);
        allocator.free(buffers.all);
    }

    pub fn take(buffers: *Buffers) ?*Buffer {
        const buffer = buffers.free orelse return null;
        buffers.free = buffer.next;
        buffers.free_count -= 1;
        buffer.record_count = 0;
        buffer.file_count = 0;
        buffer.built_count = 0;
        buffer.built_before = 0;
        buffer.reported_count = 0;
        buffer.vector_count = 0;
        buffer.run_count = 0;
        buffer.logged = false;
        buffer.oldest_ns = std.math.maxInt(u64);
        buffer.pending_runs = 0;
        buffer.settle_count = 0;
        buffer.ends_set = .initEmpty();
        buffer.next = null;
        return buffer;
    }

    pub fn give(buffers: *Buffers, buffer: *Buffer) void {
        assert(buffer.pending_runs == 0);
        buffer.next = buffers.free;
        buffers.free = buffer;
        buffers.free_count += 1;
    }
};
