//! The log on a real disk, in a directory of its own.

const std = @import("std");
const testing = std.testing;
const wal = @import("../../format/wal.zig");
const crc32c = @import("../../format/checksum.zig").crc32c;
const storage_module = @import("storage.zig");
const reader_module = @import("reader.zig");
const log_module = @import("log.zig");
const Log = log_module.Log;
const Group = log_module.Group;
const LinuxStorage = log_module.LinuxStorage;

const segment_bytes = 64 * 1024;
const options = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 64 * segment_bytes };

/// One log directory, and what it takes to work with it.
const Bench = struct {
    temporary: testing.TmpDir,
    linux: LinuxStorage,
    path: []const u8,
    memory: []align(4096) u8,
    group: Group,
    log: ?*Log,

    fn init(bench: *Bench) !void {
        bench.temporary = testing.tmpDir(.{ .iterate = true });
        bench.linux = .init(.{});
        const above = try bench.temporary.dir.realpathAlloc(testing.allocator, ".");
        defer testing.allocator.free(above);
        bench.path = try std.fs.path.join(testing.allocator, &.{ above, "orders" });
        bench.memory = try testing.allocator.alignedAlloc(u8, .fromByteUnits(4096), 256 * 1024);
        bench.group = .init(bench.memory);
        bench.log = null;
    }

    fn deinit(bench: *Bench) void {
        if (bench.log) |log| log.close();
        testing.allocator.free(bench.memory);
        testing.allocator.free(bench.path);
        bench.temporary.cleanup();
    }

    fn open(bench: *Bench, with: log_module.Options) !*Log {
        std.debug.assert(bench.log == null);
        bench.log = try Log.open(testing.allocator, bench.linux.storage(), bench.path, with);
        return bench.log.?;
    }

    fn close(bench: *Bench) void {
        bench.log.?.close();
        bench.log = null;
    }

    /// Opens, recovers, and checks that exactly LSNs `first` to `last` are delivered, each as `append` made it,
    /// twice.
    fn reopen(bench: *Bench, with: log_module.Options, first: u64, last: u64) !*Log {
        if (bench.log != null) bench.close();
        const log = try bench.open(with);
        var seen = Seen{};
        const recovery = try log.recover(.{ .context = &seen, .visit = Seen.visit });
        try testing.expectEqual(@as(?u64, null), seen.wrong_lsn);
        for (seen.passes) |pass| {
            if (first > last) {
                try testing.expectEqual(@as(u64, 0), pass.count);
                continue;
            }
            try testing.expectEqual(first, pass.first);
            try testing.expectEqual(last, pass.last);
        }
        try testing.expectEqual(seen.passes[0].count, seen.passes[1].count);
        try testing.expectEqual(seen.passes[0].count, recovery.record_count);
        return log;
    }

    fn commit(bench: *Bench, count: usize, length_bytes: u32) !void {
        bench.group.begin(bench.log.?);
        for (0..count) |_| try append(&bench.group, length_bytes);
        try bench.log.?.commit(&bench.group);
    }

    /// Overwrites bytes of a file of the log.
    fn damage(bench: *Bench, name: []const u8, offset: u64, bytes: []const u8) !void {
        var directory = try bench.temporary.dir.openDir("orders", .{});
        defer directory.close();
        const file = try directory.openFile(name, .{ .mode = .read_write });
        defer file.close();
        try file.pwriteAll(bytes, offset);
    }

    /// Names in the log directory, or one below, that end with `suffix`; sorted.
    fn names(bench: *Bench, below: []const u8, suffix: []const u8) !Names {
        var list = Names{};
        errdefer list.deinit();
        const path = try std.fs.path.join(testing.allocator, &.{ "orders", below });
        defer testing.allocator.free(path);
        var directory = bench.temporary.dir.openDir(path, .{ .iterate = true }) catch |err| switch (err) {
            error.FileNotFound => return list,
            else => return err,
        };
        defer directory.close();
        var iterator = directory.iterate();
        while (try iterator.next()) |entry| {
            if (!std.mem.endsWith(u8, entry.name, suffix)) continue;
            try list.items.append(testing.allocator, try testing.allocator.dupe(u8, entry.name));
        }
        std.mem.sort([]const u8, list.items.items, {}, struct {
            fn lessThan(_: void, a: []const u8, b: []const u8) bool {
                return std.mem.lessThan(u8, a, b);
            }
        }.lessThan);
        return list;
    }
};

const Names = struct {
    items: std.ArrayListUnmanaged([]const u8) = .empty,

    fn deinit(list: *Names) void {
        for (list.items.items) |name| testing.allocator.free(name);
        list.items.deinit(testing.allocator);
    }

    fn at(list: *const Names, index: usize) []const u8 {
        return list.items.items[index];
    }

    fn count(list: *const Names) usize {
        return list.items.items.len;
    }
};

const ring_uuid: [16]u8 = @splat(7);

fn fill(payload: []u8, lsn: u64) void {
    var prng = std.Random.DefaultPrng.init(lsn);
    prng.random().bytes(payload);
}

fn append(group: *Group, length_bytes: u32) !void {
    const slot = group.append(.{ .kind = .write, .ring_uuid = ring_uuid, .position = group.first_lsn + group.recordCount(), .file_id = 3, .length_bytes = length_bytes }) orelse
        return error.GroupFull;
    fill(slot.payload, slot.lsn);
    slot.header.payload_checksum = crc32c(0, slot.payload);
    slot.header.offset = slot.lsn * 1000;
}

const Seen = struct {
    passes: [2]struct { first: u64 = 0, last: u64 = 0, count: u64 = 0 } = .{ .{}, .{} },
    wrong_lsn: ?u64 = null,
    gaps: u64 = 0,

    fn visit(context: *anyopaque, pass_kind: log_module.Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const seen: *Seen = @ptrCast(@alignCast(context));
        const pass = &seen.passes[@intFromEnum(pass_kind)];
        var buffer: [64 * 1024]u8 = undefined;
        const expected = buffer[0..payload.len];
        fill(expected, header.lsn);
        const right = std.mem.eql(u8, expected, payload) and header.offset == header.lsn * 1000 and header.position == header.lsn and header.file_id == 3;
        if (!right or header.lsn <= pass.last) seen.wrong_lsn = header.lsn;
        if (pass.count == 0) pass.first = header.lsn else if (header.lsn != pass.last + 1) seen.gaps += 1;
        pass.last = header.lsn;
        pass.count += 1;
    }
};

fn yes(_: *anyopaque, _: *const log_module.SegmentSummary) bool {
    return true;
}

var nothing: u8 = 0;
const remove_all = log_module.MayRemove{ .context = &nothing, .ask = yes };

test "what was committed comes back after close and open, however often" {
    for ([_]bool{ true, false }) |direct| {
        var bench: Bench = undefined;
        try bench.init();
        defer bench.deinit();
        var with = options;
        with.direct = direct;
        var log = try bench.reopen(with, 1, 0);
        const uuid = log.uuid;
        try testing.expectEqual(@as(u64, 1), log.nextLsn());
        try bench.commit(1, 100);
        try bench.commit(3, 0);
        try bench.commit(5, 5000);
        try testing.expectEqual(@as(u64, 9), log.durableLsn());
        log = try bench.reopen(with, 1, 9);
        try testing.expectEqual(uuid, log.uuid);
        try testing.expectEqual(@as(u64, 10), log.nextLsn());
        try bench.commit(2, 17);
        log = try bench.reopen(with, 1, 11);
        try testing.expectEqual(@as(usize, 0), log.recovery.notes.len);
        try testing.expectEqual(@as(usize, 0), log.recovery.missing.len);
        _ = try bench.reopen(with, 1, 11);
    }
}

test "segments follow one another, are prepared ahead, and go once the checkpoint has passed them" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    var log = try bench.reopen(options, 1, 0);
    try testing.expect(!log.needsPreparation());
    for (0..40) |_| {
        try bench.commit(4, 2000);
        if (log.needsPreparation()) try log.prepareNextSegment();
        try testing.expect(!log.needsPreparation());
    }
    const last = log.durableLsn();
    try testing.expectEqual(@as(u64, 160), last);
    {
        var segments = try bench.names("", ".wal");
        defer segments.deinit();
        try testing.expect(segments.count() > 5);
        try testing.expectEqual(segments.count() * segment_bytes, log.bytesHeld());
        try testing.expectStringStartsWith(segments.at(0), "00000000000000000001-");
    }
    log = try bench.reopen(options, 1, last);
    try log.checkpoint(100);
    try log.collect(remove_all);
    log = try bench.reopen(options, 101, last);
    try log.checkpoint(last);
    try log.collect(remove_all);
    {
        // The newest stays, one is prepared, and one is kept for a new life.
        var segments = try bench.names("", ".wal");
        defer segments.deinit();
        try testing.expectEqual(@as(usize, 3), segments.count());
        try testing.expectEqual(3 * segment_bytes, log.bytesHeld());
    }
    log = try bench.reopen(options, 1, 0);
    try testing.expectEqual(last + 1, log.nextLsn());
    for (0..40) |_| {
        try bench.commit(4, 2000);
        try log.checkpoint(log.durableLsn());
        try log.collect(remove_all);
        try log.prepareNextSegment();
        try testing.expect(log.bytesHeld() <= 4 * segment_bytes);
    }
    _ = try bench.reopen(options, 1, 0);
}

test "a cancelled record takes no LSN, and a group that is full says so" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    const log = try bench.reopen(options, 1, 0);
    bench.group.begin(log);
    try append(&bench.group, 10);
    _ = bench.group.append(.{ .kind = .write, .length_bytes = 3000 }).?;
    bench.group.cancelLast();
    try append(&bench.group, 20);
    try testing.expectEqual(@as(u32, 2), bench.group.recordCount());
    while (append(&bench.group, 1000)) {} else |err| try testing.expectEqual(error.GroupFull, err);
    try testing.expect(bench.group.commitBytes() <= log.groupBytesMax());
    try log.commit(&bench.group);
    const last = bench.group.lastLsn();
    var records = bench.group.records();
    var count: u64 = 0;
    while (records.next()) |slot| count += slot.header.lsn - slot.lsn + 1;
    try testing.expectEqual(last, count);
    _ = try bench.reopen(options, 1, last);
}

test "a full log says so before it writes, and takes more once a checkpoint has made room" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    const small = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 2 * segment_bytes };
    const log = try bench.reopen(small, 1, 0);
    var commits: u64 = 0;
    while (true) : (commits += 1) {
        try testing.expect(commits < 1000);
        log.prepareNextSegment() catch |err| try testing.expectEqual(error.LogFull, err);
        const admitted = log.admits(16 * 1024);
        bench.commit(3, 4000) catch |err| {
            try testing.expectEqual(error.LogFull, err);
            try testing.expect(!admitted);
            break;
        };
        try testing.expect(admitted);
    }
    try testing.expectEqual(@as(u64, 6), commits);
    try testing.expectError(error.LogFull, log.prepareNextSegment());
    try log.checkpoint(log.durableLsn());
    try log.collect(remove_all);
    // The group that was refused, unchanged.
    try log.commit(&bench.group);
    try testing.expectEqual(@as(u64, 21), log.durableLsn());
    try testing.expectEqual(2 * segment_bytes, log.bytesHeld());
}

test "may_remove is asked with the highest position of each ring, and its no is respected" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    const log = try bench.reopen(options, 1, 0);
    for (0..20) |_| try bench.commit(4, 2000);
    const Asked = struct {
        var maximum: u64 = 0;
        fn ask(_: *anyopaque, segment: *const log_module.SegmentSummary) bool {
            std.debug.assert(segment.rings.len == 1);
            std.debug.assert(segment.rings_complete);
            std.debug.assert(std.mem.eql(u8, &segment.rings[0].ring_uuid, &ring_uuid));
            std.debug.assert(segment.rings[0].position == segment.last_lsn);
            maximum = @max(maximum, segment.last_lsn);
            return segment.last_lsn <= 40;
        }
    };
    try log.checkpoint(log.durableLsn());
    const before = log.bytesHeld();
    try log.collect(.{ .context = &nothing, .ask = Asked.ask });
    try testing.expect(Asked.maximum > 40);
    try testing.expect(log.bytesHeld() < before);
    try testing.expect(log.bytesHeld() > 2 * segment_bytes);
}

test "damage below what was durable is put aside, named to the record, and what is good beyond is delivered" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    _ = try bench.reopen(options, 1, 0);
    for (0..6) |_| try bench.commit(3, 1000); // one block each; the first at 4096
    bench.close();
    var segments = try bench.names("", ".wal");
    defer segments.deinit();
    try bench.damage(segments.at(0), 4096 * 2 + 3, "damage"); // header of the group with LSNs 4 to 6
    try bench.damage(segments.at(0), 4096 * 4 + @sizeOf(wal.GroupHeader) + @sizeOf(wal.RecordHeader) + 1000 + 200, "damage"); // payload of LSN 11

    const expected = [_]log_module.LsnRange{ .{ .first = 4, .last = 6 }, .{ .first = 11, .last = 11 } };
    for (0..2) |_| {
        const log = try bench.open(options);
        var seen = Seen{};
        const recovery = try log.recover(.{ .context = &seen, .visit = Seen.visit });
        try testing.expectEqualSlices(log_module.LsnRange, &expected, recovery.missing);
        try testing.expectEqual(@as(u64, 4), recovery.missing_records);
        try testing.expectEqual(@as(u64, 14), recovery.record_count);
        try testing.expectEqual(@as(u64, 18), seen.passes[1].last);
        try testing.expectEqual(@as(u64, 2 * 2), seen.gaps);
        try testing.expectEqualStrings("lost-4-11-4.json", recovery.receipt_name);
        try testing.expectEqual(@as(u64, 19), log.nextLsn());
        bench.close();
        // Found again by the second start: the same receipt, the same evidence.
        var receipts = try bench.names("receipts", "");
        defer receipts.deinit();
        try testing.expectEqual(@as(usize, 1), receipts.count());
        var evidence = try bench.names("quarantine", "");
        defer evidence.deinit();
        try testing.expectEqual(@as(usize, 2), evidence.count());
        try testing.expectStringEndsWith(evidence.at(0), ".wal.16384+4096");
        try testing.expectStringEndsWith(evidence.at(1), ".wal.8192+4096");
    }
}

test "what does not belong in the directory is put aside or left alone, and stops nothing" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    _ = try bench.reopen(options, 1, 0);
    for (0..30) |_| try bench.commit(4, 2000);
    const last = bench.log.?.durableLsn();
    bench.close();

    var directory = try bench.temporary.dir.openDir("orders", .{});
    defer directory.close();
    var segments = try bench.names("", ".wal");
    defer segments.deinit();
    try directory.writeFile(.{ .sub_path = "empty.wal", .data = "" });
    try directory.writeFile(.{ .sub_path = "text.wal", .data = "not a segment\n" });
    try directory.writeFile(.{ .sub_path = "notes.txt", .data = "anything else is left alone\n" });
    try directory.makeDir("directory.wal");
    try directory.symLink("/etc/passwd", "link.wal", .{});
    const fifo = std.os.linux.mknodat(directory.fd, "fifo.wal", std.os.linux.S.IFIFO | 0o600, 0);
    try testing.expectEqual(@as(usize, 0), fifo);
    {
        const giant = try directory.createFile("giant.wal", .{});
        defer giant.close();
        try giant.setEndPos(1 << 43);
    }
    {
        // A copy that was broken off.
        const whole = try directory.readFileAlloc(testing.allocator, segments.at(1), segment_bytes);
        defer testing.allocator.free(whole);
        try directory.writeFile(.{ .sub_path = "zz-copy.wal", .data = whole[0 .. segment_bytes / 2] });
        // A segment of another log.
        const header: *align(1) wal.SegmentHeader = @ptrCast(whole[0..128]);
        header.log_uuid[0] ^= 1;
        var aligned = header.*;
        aligned.header_checksum = aligned.computeChecksum();
        header.* = aligned;
        try directory.writeFile(.{ .sub_path = "00000000000000000001-foreign.wal", .data = whole });
    }

    _ = try bench.reopen(options, 1, last);
    var quarantined = try bench.names("quarantine", "");
    defer quarantined.deinit();
    const expected = [_][]const u8{ "00000000000000000001-foreign.wal", "empty.wal", "giant.wal", "text.wal", "zz-copy.wal" };
    try testing.expectEqual(expected.len, quarantined.count());
    for (expected, 0..) |name, index| try testing.expectEqualStrings(name, quarantined.at(index));
    try testing.expectEqual(expected.len + 3, bench.log.?.recovery.notes.len);
    try directory.access("notes.txt", .{});

    // The same names again: kept beside the first.
    try directory.writeFile(.{ .sub_path = "text.wal", .data = "not a segment either\n" });
    _ = try bench.reopen(options, 1, last);
    try directory.access("quarantine/text.wal.1", .{});
}

test "options that no log can have, and a directory that cannot be made, are refused in words" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    const Case = struct { u64, u64 };
    for ([_]Case{ .{ 0, 1 << 30 }, .{ 4096, 1 << 30 }, .{ 70_000, 1 << 30 }, .{ 1 << 20, (2 << 20) - 1 }, .{ 1 << 40, 1 << 60 } }) |case| {
        var explanation = log_module.Explanation{};
        const with = log_module.Options{ .segment_bytes = case[0], .log_bytes_max = case[1], .explanation = &explanation };
        try testing.expectError(error.InvalidOptions, Log.open(testing.allocator, bench.linux.storage(), bench.path, with));
        try testing.expect(explanation.length > 0);
    }
    var explanation = log_module.Explanation{};
    var with = options;
    with.explanation = &explanation;
    const nowhere = try std.fs.path.join(testing.allocator, &.{ bench.path, "missing", "orders" });
    defer testing.allocator.free(nowhere);
    try testing.expectError(error.NotFound, Log.open(testing.allocator, bench.linux.storage(), nowhere, with));
    try testing.expect(std.mem.indexOf(u8, explanation.text(), nowhere) != null);
}

test "a visitor that stops ends the recovery, and the log is as it was" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    _ = try bench.reopen(options, 1, 0);
    for (0..5) |_| try bench.commit(4, 2000);
    bench.close();
    const log = try bench.open(options);
    const Stopping = struct {
        fn visit(_: *anyopaque, _: log_module.Pass, header: *const wal.RecordHeader, _: []const u8) error{VisitorStopped}!void {
            if (header.lsn == 7) return error.VisitorStopped;
        }
    };
    try testing.expectError(error.VisitorStopped, log.recover(.{ .context = &nothing, .visit = Stopping.visit }));
    _ = try bench.reopen(options, 1, 20);
}

test "the worker commits while maintenance zero-writes, prepares, checkpoints and collects" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    // Pieces so small that the worker overtakes.
    const with = log_module.Options{ .segment_bytes = 1 << 20, .log_bytes_max = 16 << 20, .zero_bytes = 16 * 1024, .zero_ahead_bytes = 64 * 1024 };
    const log = try bench.reopen(with, 1, 0);

    const Maintenance = struct {
        log: *Log,
        ended: std.atomic.Value(bool) = .init(false),
        failed: std.atomic.Value(bool) = .init(false),

        fn prepare(self: *@This()) void {
            while (!self.ended.load(.acquire)) {
                if (self.log.needsPreparation()) self.log.prepareNextSegment() catch |err| {
                    if (err != error.LogFull) self.failed.store(true, .release);
                };
                std.Thread.yield() catch {};
            }
        }

        fn collect(self: *@This()) void {
            while (!self.ended.load(.acquire)) {
                // Some of what is durable stays above, to come back.
                self.log.checkpoint(self.log.durableLsn() -| 50) catch self.failed.store(true, .release);
                self.log.collect(remove_all) catch self.failed.store(true, .release);
                std.Thread.yield() catch {};
            }
        }
    };
    var maintenance = Maintenance{ .log = log };
    const threads = [_]std.Thread{
        try std.Thread.spawn(.{}, Maintenance.prepare, .{&maintenance}),
        try std.Thread.spawn(.{}, Maintenance.collect, .{&maintenance}),
    };
    const outcome: anyerror!void = blk: {
        var refusals: u32 = 0;
        for (0..300) |index| {
            bench.group.begin(log);
            for (0..3) |_| append(&bench.group, @intCast(index * 37 % 14_000)) catch |err| break :blk err;
            while (log.commit(&bench.group)) break else |err| {
                // Until the checkpoint has made room.
                refusals += 1;
                if (err != error.LogFull or refusals > 1_000_000) break :blk err;
                std.Thread.yield() catch {};
            }
        }
    };
    maintenance.ended.store(true, .release);
    for (threads) |thread| thread.join();
    try outcome;
    try testing.expect(!maintenance.failed.load(.acquire));
    const applied = log.durableLsn() - 50;
    try log.checkpoint(applied);
    try testing.expect(log.bytesHeld() <= with.log_bytes_max);
    _ = try bench.reopen(with, applied + 1, 900);
    try testing.expectEqual(@as(usize, 0), bench.log.?.recovery.notes.len);
}

test "starts without work take no space" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    _ = try bench.reopen(options, 1, 0);
    for (0..30) |_| try bench.commit(4, 2000);
    const last = bench.log.?.durableLsn();
    const held = (try bench.reopen(options, 1, last)).bytesHeld();
    for (0..10) |_| {
        const log = try bench.reopen(options, 1, last);
        try testing.expectEqual(held, log.bytesHeld());
    }
}

/// As a daemon's maintenance does it, after each of some commits.
fn work(bench: *Bench, commits: usize) !void {
    const log = bench.log.?;
    for (0..commits) |_| {
        try bench.commit(4, 2000);
        if (log.needsPreparation()) try log.prepareNextSegment();
        try log.checkpoint(log.durableLsn());
        try log.collect(remove_all);
    }
}

test "segments that the checkpoint has passed are kept as history, which no start reads" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    var with = options;
    with.age_max_ns = std.time.ns_per_day;
    var log = try bench.reopen(with, 1, 0);
    try work(&bench, 40);
    const last = log.durableLsn();
    var kept = try bench.names("history", ".wal");
    defer kept.deinit();
    var segments = try bench.names("", ".wal");
    defer segments.deinit();
    try testing.expect(kept.count() > 5);
    try testing.expectStringStartsWith(kept.at(0), "00000000000000000001-");
    try testing.expectEqual((kept.count() + segments.count()) * segment_bytes, log.bytesHeld());

    // Garbage there, and somebody's own files, do not matter to anybody.
    try bench.temporary.dir.writeFile(.{ .sub_path = "orders/history/note.txt", .data = "mine" });
    const damaged = try std.fmt.allocPrint(testing.allocator, "history/{s}", .{kept.at(1)});
    defer testing.allocator.free(damaged);
    try bench.damage(damaged, 0, &@as([8192]u8, @splat(0x55)));
    // Nor do they come back where nothing says how far the checkpoint was.
    const first = log.segments.?.first_lsn;
    try testing.expect(first > 100);
    bench.close();
    try bench.damage("checkpoint", 20, "damage");
    try bench.damage("checkpoint", 4096 + 20, "damage");
    log = try bench.reopen(with, first, last);
    try testing.expectEqual(@as(usize, 0), log.recovery.missing.len);
    try log.checkpoint(last);

    // A day later, or without the wish to keep them, they go; a stranger's file stays.
    with.age_max_ns = 0;
    log = try bench.reopen(with, 1, 0);
    try testing.expect(log.historyIsDue());
    try log.trimHistory();
    try testing.expect(!log.historyIsDue());
    var rest = try bench.names("history", "");
    defer rest.deinit();
    try testing.expectEqual(@as(usize, 1), rest.count());
    try testing.expectEqualStrings("note.txt", rest.at(0));
    var left = try bench.names("", ".wal");
    defer left.deinit();
    try testing.expectEqual(left.count() * segment_bytes, log.bytesHeld());
}

test "history goes when it is old enough, the oldest first, whether or not anything is written" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    var with = options;
    with.age_max_ns = 100 * std.time.ns_per_ms;
    const log = try bench.reopen(with, 1, 0);
    try work(&bench, 20);
    const begun_ns = log.storage.realtimeNs();
    while (true) {
        if (log.historyIsDue()) try log.trimHistory();
        var kept = try bench.names("history", ".wal");
        defer kept.deinit();
        if (kept.count() == 0) break;
        try testing.expect(log.storage.realtimeNs() < begun_ns + 10 * std.time.ns_per_s);
        std.Thread.yield() catch {};
    }
    try testing.expect(!log.historyIsDue());
}

test "history gives way to the log: it never makes it full" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    const with = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 8 * segment_bytes, .age_max_ns = std.time.ns_per_day };
    var log = try bench.reopen(with, 1, 0);
    var before: u64 = 0;
    for (0..60) |_| {
        // The worker overtakes maintenance, each time by a segment.
        for (0..8) |_| {
            try testing.expect(log.admits(12 * 1024));
            try bench.commit(4, 2000);
        }
        try testing.expect(log.bytesHeld() <= with.log_bytes_max);
        try log.checkpoint(log.durableLsn());
        try log.collect(remove_all);
        try log.prepareNextSegment();
        var kept = try bench.names("history", ".wal");
        defer kept.deinit();
        if (kept.count() == 0) continue;
        const first = try std.fmt.parseInt(u64, kept.at(0)[0..20], 10);
        try testing.expect(first >= before);
        before = first;
    }
    try testing.expect(before > 1);
    const last = log.durableLsn();
    // Its room is smaller from now on.
    const smaller = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 4 * segment_bytes, .age_max_ns = std.time.ns_per_day };
    log = try bench.reopen(smaller, 1, 0);
    try testing.expectEqual(last + 1, log.nextLsn());
    try testing.expect(log.bytesHeld() <= smaller.log_bytes_max);
    try testing.expect(log.admits(12 * 1024));
    try bench.commit(4, 2000);
}

test "where segments cannot be kept they are removed all the same, and why is said once" {
    var bench: Bench = undefined;
    try bench.init();
    defer bench.deinit();
    var with = options;
    with.age_max_ns = std.time.ns_per_day;
    const log = try bench.reopen(with, 1, 0);
    try bench.temporary.dir.writeFile(.{ .sub_path = "orders/history", .data = "in the way" });
    try work(&bench, 40);
    try testing.expect(log.bytesHeld() <= 4 * segment_bytes);
    try testing.expectEqual(@as(?storage_module.Error, error.NotADirectory), log.takeHistoryFailure());
    try testing.expectEqual(@as(?storage_module.Error, null), log.takeHistoryFailure());
}
