//! What becomes of a log whose disk did not keep what it was given: damaged, unreadable, cut short, hostile. On a
//! simulated disk, so that many kinds of damage can be tried quickly.

const std = @import("std");
const testing = std.testing;
const wal = @import("../../format/wal.zig");
const crc32c = @import("../../format/checksum.zig").crc32c;
const log_module = @import("log.zig");
const SimulatedDisk = @import("../../testing/simulated_disk.zig").SimulatedDisk;
const Log = log_module.Log;
const Group = log_module.Group;

const path = "wal/orders";
const quarantine_path = path ++ "/quarantine";
const segment_bytes = 64 * 1024;
const options = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 1 << 30, .zero_bytes = 16 * 1024, .zero_ahead_bytes = 64 * 1024 };
const length_bytes = 700;
const records_per_group = 4;

/// A log on a simulated disk, whose record n holds what `fill` makes of n.
const Scene = struct {
    disk: SimulatedDisk,
    memory: []align(4096) u8,
    group: Group,
    log: ?*Log,
    arena: std.heap.ArenaAllocator,
    /// By LSN - 1: how often it was delivered in the survey pass of the last recovery.
    delivered: std.ArrayListUnmanaged(u8),
    wrong: bool,
    last_lsn: u64,

    fn init(scene: *Scene, seed: u64) !void {
        scene.* = .{
            .disk = .init(std.heap.page_allocator, seed),
            .memory = try testing.allocator.alignedAlloc(u8, .fromByteUnits(4096), segment_bytes),
            .group = undefined,
            .log = null,
            .arena = .init(testing.allocator),
            .delivered = .empty,
            .wrong = false,
            .last_lsn = 0,
        };
        scene.group = .init(scene.memory);
    }

    fn deinit(scene: *Scene) void {
        if (scene.log) |log| log.close();
        scene.arena.deinit();
        testing.allocator.free(scene.memory);
        scene.disk.deinit();
    }

    fn open(scene: *Scene) !*const log_module.Recovery {
        return scene.openWith(options);
    }

    fn openWith(scene: *Scene, with: log_module.Options) !*const log_module.Recovery {
        std.debug.assert(scene.log == null);
        scene.delivered.clearRetainingCapacity();
        scene.wrong = false;
        scene.last_lsn = 0;
        const log = try Log.open(testing.allocator, scene.disk.storage(), path, with);
        errdefer log.close();
        const recovery = try log.recover(.{ .context = scene, .visit = visit });
        scene.log = log;
        try testing.expect(!scene.wrong);
        return recovery;
    }

    fn close(scene: *Scene) void {
        scene.log.?.close();
        scene.log = null;
    }

    fn append(scene: *Scene) !void {
        const slot = scene.group.append(.{ .kind = .write, .length_bytes = length_bytes }).?;
        fill(slot.payload, slot.lsn);
        slot.header.payload_checksum = crc32c(0, slot.payload);
    }

    fn commit(scene: *Scene) !void {
        scene.group.begin(scene.log.?);
        for (0..records_per_group) |_| try scene.append();
        try scene.log.?.commit(&scene.group);
    }

    fn build(scene: *Scene, groups: usize) !void {
        _ = try scene.open();
        for (0..groups) |_| {
            try scene.commit();
            if (scene.log.?.needsPreparation()) try scene.log.?.prepareNextSegment();
        }
    }

    fn names(scene: *Scene, directory: []const u8, suffix: []const u8) ![][]const u8 {
        return scene.disk.list(scene.arena.allocator(), directory, suffix);
    }

    fn wasDelivered(scene: *const Scene, lsn: u64) bool {
        return lsn <= scene.delivered.items.len and scene.delivered.items[lsn - 1] == 1;
    }

    fn visit(context: *anyopaque, pass: log_module.Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const scene: *Scene = @ptrCast(@alignCast(context));
        if (pass == .apply) return;
        var expected: [length_bytes]u8 = undefined;
        fill(&expected, header.lsn);
        if (!std.mem.eql(u8, &expected, payload) or header.lsn <= scene.last_lsn) scene.wrong = true;
        scene.last_lsn = header.lsn;
        while (scene.delivered.items.len < header.lsn) scene.delivered.append(scene.arena.allocator(), 0) catch return error.VisitorStopped;
        scene.delivered.items[header.lsn - 1] += 1;
    }
};

fn fill(payload: []u8, lsn: u64) void {
    var prng = std.Random.DefaultPrng.init(lsn);
    prng.random().bytes(payload);
}

fn yes(_: *anyopaque, _: *const log_module.SegmentSummary) bool {
    return true;
}

test "random damage: every record that was durable is delivered as it was, or named as missing" {
    const seed_count = 150;
    const seed_first = std.crypto.random.int(u32);
    for (0..seed_count) |index| {
        const seed = seed_first + index;
        errdefer std.debug.print("\ndamage: seed {d}\n", .{seed});
        var prng = std.Random.DefaultPrng.init(seed);
        const random = prng.random();
        var scene: Scene = undefined;
        try scene.init(seed);
        defer scene.deinit();
        try scene.build(10 + random.uintLessThan(usize, 60));
        // The checkpoint says how far the log was durable; without it the end of the log is only known by what it holds.
        const acknowledged = scene.log.?.durableLsn();
        try scene.log.?.checkpoint(0);
        scene.close();
        const segments = try scene.names(path, ".wal");
        for (0..1 + random.uintLessThan(usize, 4)) |_| {
            const name = segments[random.uintLessThan(usize, segments.len)];
            var bytes: [8192]u8 = @splat(0);
            const count = 1 + random.uintLessThan(usize, bytes.len);
            if (random.boolean()) random.bytes(&bytes);
            const offset = random.uintAtMost(u64, segment_bytes - count);
            scene.disk.damage(path, name, offset, bytes[0..count]);
        }
        for (0..2) |_| {
            const recovery = try scene.open();
            for (1..acknowledged + 1) |lsn| {
                var is_missing = false;
                for (recovery.missing) |range| is_missing = is_missing or (lsn >= range.first and lsn <= range.last);
                if (scene.wasDelivered(lsn) == is_missing) {
                    std.debug.print("\nLSN {d}: delivered {}, missing {}\n", .{ lsn, scene.wasDelivered(lsn), is_missing });
                    return error.Unaccounted;
                }
            }
            try testing.expectEqual(recovery.missing_records > 0, recovery.receipt_name.len > 0);
            try testing.expectEqual(acknowledged + 1, scene.log.?.nextLsn());
            scene.close();
        }
    }
}

// Damage with a valid checksum is no accident.
test "hostile headers: no length, count or number in them leads astray" {
    const seed_count = 150;
    const seed_first = std.crypto.random.int(u32);
    for (0..seed_count) |index| {
        const seed = seed_first + index;
        errdefer std.debug.print("\nhostile: seed {d}\n", .{seed});
        var prng = std.Random.DefaultPrng.init(seed);
        const random = prng.random();
        var scene: Scene = undefined;
        try scene.init(seed);
        defer scene.deinit();
        try scene.build(20);
        scene.close();
        const segments = try scene.names(path, ".wal");
        for (0..1 + random.uintLessThan(usize, 3)) |_| {
            const name = segments[random.uintLessThan(usize, segments.len)];
            const contents = scene.disk.contents(path, name).?;
            switch (random.uintLessThan(u8, 4)) {
                0 => {
                    var header: wal.SegmentHeader = undefined;
                    @memcpy(std.mem.asBytes(&header), contents[0..@sizeOf(wal.SegmentHeader)]);
                    switch (random.uintLessThan(u8, 5)) {
                        0 => header.size_bytes = hostile(u64, random),
                        1 => header.first_lsn = hostile(u64, random),
                        2 => header.sealed_lsn = hostile(u64, random),
                        3 => header.epoch = hostile(u64, random),
                        else => header.segment_id = hostile(u64, random),
                    }
                    header.header_checksum = header.computeChecksum();
                    scene.disk.damage(path, name, 0, std.mem.asBytes(&header));
                },
                1, 2 => {
                    const offset = 4096 * (1 + random.uintLessThan(u64, 8));
                    var header: wal.GroupHeader = undefined;
                    @memcpy(std.mem.asBytes(&header), contents[offset..][0..@sizeOf(wal.GroupHeader)]);
                    if (header.magic != wal.group_magic) continue;
                    switch (random.uintLessThan(u8, 4)) {
                        0 => header.length_bytes = hostile(u32, random),
                        1 => header.record_count = hostile(u32, random),
                        2 => header.first_lsn = hostile(u64, random),
                        else => header.durable_lsn = hostile(u64, random),
                    }
                    header.header_checksum = header.computeChecksum();
                    scene.disk.damage(path, name, offset, std.mem.asBytes(&header));
                },
                else => {
                    const offset = 4096 + @sizeOf(wal.GroupHeader) + random.uintLessThan(u64, 3) * wal.recordBytes(length_bytes);
                    var header: wal.RecordHeader = undefined;
                    @memcpy(std.mem.asBytes(&header), contents[offset..][0..@sizeOf(wal.RecordHeader)]);
                    if (header.magic != wal.record_magic) continue;
                    header.length_bytes = hostile(u32, random);
                    header.header_checksum = header.computeChecksum();
                    scene.disk.damage(path, name, offset, std.mem.asBytes(&header));
                },
            }
        }
        // Whatever is believed of it: no crash, nothing wrong delivered, and the log can go on.
        _ = try scene.open();
        try scene.commit();
        scene.close();
    }
}

fn hostile(comptime T: type, random: std.Random) T {
    return switch (random.uintLessThan(u8, 6)) {
        0 => 0,
        1 => std.math.maxInt(T),
        2 => std.math.maxInt(T) - random.uintLessThan(T, 200),
        3 => random.int(T),
        4 => std.math.maxInt(T) / 4 - random.uintLessThan(T, 3),
        else => random.uintLessThan(T, 100_000),
    };
}

test "a segment whose first block is gone is known by its last" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(80);
    const last = scene.log.?.durableLsn();
    scene.close();
    const segments = try scene.names(path, ".wal");
    try testing.expect(segments.len >= 4);
    const nothing: [4096]u8 = @splat(0);
    scene.disk.damage(path, segments[0], 0, &nothing);
    scene.disk.damage(path, segments[1], 0, "damage");
    const recovery = try scene.open();
    try testing.expectEqual(last, recovery.record_count);
    try testing.expectEqual(@as(usize, 0), recovery.missing.len);
    try testing.expectEqual(@as(usize, 2), recovery.notes.len);
}

test "a segment that its first block alone speaks for is not sealed: a write that is cut short would be the end of it" {
    for ([_]bool{ false, true }) |is_damaged| {
        var scene: Scene = undefined;
        try scene.init(1);
        defer scene.deinit();
        try scene.build(20);
        const last = scene.log.?.durableLsn();
        const newest = try testing.allocator.dupe(u8, scene.log.?.current.load(.monotonic).?.name());
        defer testing.allocator.free(newest);
        scene.close();
        const contents = scene.disk.contents(path, newest).?;
        if (is_damaged) scene.disk.damage(path, newest, contents.len - 4096, "damage");
        const first_block = try testing.allocator.dupe(u8, contents[0..4096]);
        defer testing.allocator.free(first_block);
        const recovery = try scene.open();
        try testing.expectEqual(last, recovery.record_count);
        try testing.expectEqual(is_damaged, std.mem.eql(u8, first_block, scene.disk.contents(path, newest).?[0..4096]));
    }
}

test "a segment that is gone is missed, to the record" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(80);
    const last = scene.log.?.durableLsn();
    scene.close();
    const segments = try scene.names(path, ".wal");
    const storage = scene.disk.storage();
    const directory = try storage.openDirectory(null, path);
    try storage.unlink(directory, segments[1]);
    const first_of_next = try std.fmt.parseInt(u64, segments[2][0..20], 10);
    const first_of_gone = try std.fmt.parseInt(u64, segments[1][0..20], 10);
    const recovery = try scene.open();
    try testing.expectEqualSlices(log_module.LsnRange, &.{.{ .first = first_of_gone, .last = first_of_next - 1 }}, recovery.missing);
    try testing.expectEqual(last - recovery.missing_records, recovery.record_count);
}

test "both checkpoints damaged: all that the log still holds is applied again" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(80);
    const last = scene.log.?.durableLsn();
    const uuid = scene.log.?.uuid;
    try scene.log.?.checkpoint(last / 2);
    try scene.log.?.collect(.{ .context = &scene, .ask = yes });
    scene.close();
    const first = try std.fmt.parseInt(u64, (try scene.names(path, ".wal"))[0][0..20], 10);
    try testing.expect(first > 1);
    scene.disk.damage(path, "checkpoint", 20, "damage");
    scene.disk.damage(path, "checkpoint", 4096 + 20, "damage");
    const recovery = try scene.open();
    try testing.expectEqual(uuid, scene.log.?.uuid);
    try testing.expectEqual(first - 1, recovery.applied_lsn);
    try testing.expectEqual(last - first + 1, recovery.record_count);
    try testing.expectEqual(@as(usize, 0), recovery.missing.len);
    try testing.expectEqual(@as(usize, 1), recovery.notes.len);
}

test "either checkpoint alone is enough once segments were removed" {
    for (0..2) |block| {
        var scene: Scene = undefined;
        try scene.init(1);
        defer scene.deinit();
        try scene.build(80);
        const last = scene.log.?.durableLsn();
        try scene.log.?.checkpoint(last / 2);
        try scene.log.?.collect(.{ .context = &scene, .ask = yes });
        scene.close();
        scene.disk.damage(path, "checkpoint", block * 4096 + 20, "damage");
        const recovery = try scene.open();
        try testing.expectEqual(last / 2, recovery.applied_lsn);
        try testing.expectEqual(@as(usize, 0), recovery.missing.len);
        try testing.expectEqual(last - last / 2, recovery.record_count);
    }
}

test "blocks that the disk refuses to read cost their records only, and their segment is never removed" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(80);
    const last = scene.log.?.durableLsn();
    scene.close();
    const segments = try scene.names(path, ".wal");
    scene.disk.makeUnreadable(path, segments[0], 8192 + 512, 100);
    const recovery = try scene.open();
    try testing.expectEqualSlices(log_module.LsnRange, &.{.{ .first = 5, .last = 8 }}, recovery.missing);
    try testing.expectEqual(last - 4, recovery.record_count);
    const before = (try scene.names(path, ".wal")).len;
    try scene.log.?.checkpoint(last);
    try scene.log.?.collect(.{ .context = &scene, .ask = yes });
    try testing.expect((try scene.names(path, ".wal")).len < before);
    const kept = try scene.names(quarantine_path, segments[0]);
    try testing.expectEqual(@as(usize, 1), kept.len);
}

test "a failed write is never repeated on its blocks: the group goes to a new segment" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(3);
    const first_segment = (try scene.names(path, ".wal"))[0];
    const before = try testing.allocator.dupe(u8, scene.disk.contents(path, first_segment).?[4096..]);
    defer testing.allocator.free(before);
    scene.disk.failing_operations_left = 1;
    try scene.commit();
    try testing.expectEqual(@as(u64, 16), scene.log.?.durableLsn());
    try scene.commit();
    try scene.log.?.prepareNextSegment();
    // Of the old segment nothing has changed but its header, and what the failed write itself left.
    const after = scene.disk.contents(path, first_segment) orelse scene.disk.contents(path, (try scene.names(path, ".wal"))[0]).?;
    try testing.expectEqualSlices(u8, before[0 .. 3 * 4096], after[4096..][0 .. 3 * 4096]);
    const header: *align(1) const wal.SegmentHeader = @ptrCast(after);
    try testing.expectEqual(@as(u64, 12), header.sealed_lsn);
    scene.close();
    for (0..2) |_| {
        const recovery = try scene.open();
        try testing.expectEqual(@as(u64, 20), recovery.record_count);
        scene.close();
    }
}

test "a disk that stays broken gives its errno, and once it is mended the same group goes through" {
    const Case = struct { @FieldType(SimulatedDisk, "failing_with"), anyerror, std.os.linux.E };
    for ([_]Case{
        .{ .input_output, error.InputOutput, .IO },
        .{ .no_space, error.NoSpace, .NOSPC },
        .{ .read_only, error.ReadOnly, .ROFS },
    }) |case| {
        var scene: Scene = undefined;
        try scene.init(1);
        defer scene.deinit();
        try scene.build(3);
        const log = scene.log.?;
        scene.group.begin(log);
        for (0..records_per_group) |_| try scene.append();
        scene.disk.failing_with = case[0];
        scene.disk.failing_operations_left = 1_000_000;
        for (0..10) |_| {
            try testing.expectError(case[1], log.commit(&scene.group));
            try testing.expectEqual(@as(i32, @intFromEnum(case[2])), log_module.errnoOf(@errorCast(@as(anyerror, case[1]))));
            try testing.expectEqual(@as(u64, 12), log.durableLsn());
            log.prepareNextSegment() catch {};
        }
        scene.disk.failing_operations_left = 0;
        try log.commit(&scene.group);
        try testing.expectEqual(@as(u64, 16), log.durableLsn());
        try log.prepareNextSegment();
        try scene.commit();
        // The attempts have left nothing behind.
        try testing.expectEqual((try scene.names(path, ".wal")).len * segment_bytes, log.bytesHeld());
        try testing.expect(log.bytesHeld() <= 3 * segment_bytes);
        scene.close();
        const recovery = try scene.open();
        try testing.expectEqual(@as(u64, 20), recovery.record_count);
    }
}

test "on a full disk the log goes on in what was only kept" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    _ = try scene.openWith(.{ .segment_bytes = segment_bytes, .log_bytes_max = 1 << 30, .zero_bytes = 16 * 1024, .zero_ahead_bytes = 64 * 1024, .age_max_ns = std.math.maxInt(u64) });
    const log = scene.log.?;
    for (0..80) |_| {
        try scene.commit();
        if (log.needsPreparation()) try log.prepareNextSegment();
    }
    try log.checkpoint(log.durableLsn());
    try log.collect(.{ .context = &scene, .ask = yes });
    const kept = (try scene.names(path ++ "/history", ".wal")).len;
    try testing.expect(kept > 2);
    scene.disk.no_space_per_mille = 1000;
    const first_lsn = log.durableLsn();
    var groups: usize = 0;
    while (scene.commit()) : (groups += 1) {
        log.prepareNextSegment() catch {};
    } else |err| try testing.expectEqual(error.NoSpace, err);
    try testing.expectEqual(@as(usize, 0), (try scene.names(path ++ "/history", ".wal")).len);
    try testing.expect(groups > kept * (segment_bytes / 4096 - 2));
    try testing.expectEqual(first_lsn + groups * records_per_group, log.durableLsn());
}

test "another version of the format is refused in words, and nothing is touched" {
    for ([_][]const u8{ "checkpoint", "segment" }) |what| {
        var scene: Scene = undefined;
        try scene.init(1);
        defer scene.deinit();
        try scene.build(3);
        scene.close();
        const segments = try scene.names(path, ".wal");
        if (std.mem.eql(u8, what, "segment")) {
            var header: wal.SegmentHeader = undefined;
            @memcpy(std.mem.asBytes(&header), scene.disk.contents(path, segments[0]).?[0..@sizeOf(wal.SegmentHeader)]);
            header.version = wal.version + 1;
            header.header_checksum = header.computeChecksum();
            scene.disk.damage(path, segments[0], 0, std.mem.asBytes(&header));
        } else for (0..2) |block| {
            var header: wal.Checkpoint = undefined;
            @memcpy(std.mem.asBytes(&header), scene.disk.contents(path, "checkpoint").?[block * 4096 ..][0..@sizeOf(wal.Checkpoint)]);
            if (header.magic != wal.checkpoint_magic) continue;
            header.version = wal.version + 1;
            header.header_checksum = header.computeChecksum();
            scene.disk.damage(path, "checkpoint", block * 4096, std.mem.asBytes(&header));
        }
        var explanation = log_module.Explanation{};
        var with = options;
        with.explanation = &explanation;
        const operations = scene.disk.operation_count;
        try testing.expectError(error.LogVersion, Log.open(testing.allocator, scene.disk.storage(), path, with));
        try testing.expect(std.mem.indexOf(u8, explanation.text(), std.fmt.comptimePrint("of version {d}", .{wal.version + 1})) != null);
        try testing.expectEqual(operations, scene.disk.operation_count);
    }
}

test "memory that runs out anywhere in open and recover is an error, and leaks nothing" {
    var scene: Scene = undefined;
    try scene.init(1);
    defer scene.deinit();
    try scene.build(40);
    scene.close();
    const segments = try scene.names(path, ".wal");
    scene.disk.damage(path, segments[0], 4096 * 3, "damage");
    const storage = scene.disk.storage();
    var index: usize = 0;
    while (true) : (index += 1) {
        try testing.expect(index < 1000);
        var failing = testing.FailingAllocator.init(testing.allocator, .{ .fail_index = index });
        const log = Log.open(failing.allocator(), storage, path, options) catch |err| {
            try testing.expectEqual(error.OutOfMemory, err);
            continue;
        };
        defer log.close();
        const recovery = log.recover(.{ .context = &scene, .visit = ignore }) catch |err| {
            try testing.expect(err == error.OutOfMemory or err == error.OutOfKernelMemory);
            continue;
        };
        if (failing.has_induced_failure) continue; // a note that was not made
        try testing.expectEqual(@as(u64, 4), recovery.missing_records);
        break;
    }
    try testing.expect(index > 8);
    _ = try scene.open();
}

fn ignore(_: *anyopaque, _: log_module.Pass, _: *const wal.RecordHeader, _: []const u8) error{VisitorStopped}!void {}
