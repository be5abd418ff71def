//! The log on a simulated disk, through many lives that end in power cuts and kills at any operation, with and
//! without failing writes; each from one seed. What must hold in each life: everything that was ever acknowledged is
//! delivered, in order, once, as it was; what is delivered was committed; nothing is said to be missing. And the
//! same run must notice when the log, or the disk, is made to break its word.

const std = @import("std");
const wal = @import("../../format/wal.zig");
const crc32c = @import("../../format/checksum.zig").crc32c;
const reader_module = @import("reader.zig");
const log_module = @import("log.zig");
const SimulatedDisk = @import("../../testing/simulated_disk.zig").SimulatedDisk;
const Log = log_module.Log;
const Group = log_module.Group;

const path = "wal/orders";
const segment_bytes = 48 * 1024;
const options = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 1 << 30, .zero_bytes = 8 * 1024 };

const Violation = error{
    /// Acknowledged, and not delivered.
    Lost,
    /// Delivered, and not what was committed under that LSN.
    Wrong,
    OutOfOrder,
    /// The two passes differ.
    PassesDiffer,
    /// The log says that something is missing, or damaged, or does not belong, on a disk that did nothing wrong.
    FalseAlarm,
    CheckpointWrong,
    /// A commit or an open failed on a disk that did not.
    Refused,
    AccountsWrong,
};

const Settings = struct {
    seed: u64,
    /// Writes and syncs fail now and then.
    faults: bool,
    ignore_durable_writes: bool = false,
    ignore_checkpoint_writes: bool = false,
    /// A violation is what is hoped for: say nothing of it.
    quiet: bool = false,
};

/// What one commit attempt put under an LSN. `tag` stands in the record and determines its payload.
const Attempt = struct { lsn: u64, tag: u64 };

const Run = struct {
    settings: Settings,
    disk: SimulatedDisk,
    /// Not the disk's: so that what the test does not depend on what the log asks of the disk.
    prng: std.Random.DefaultPrng,
    log: ?*Log = null,
    memory: []align(4096) u8,
    group: Group,
    next_tag: u64 = 1,
    /// By LSN - 1: what is acknowledged.
    acknowledged: std.ArrayListUnmanaged(u64) = .empty,
    /// By tag - 1: the LSN it was tried under.
    attempts: std.ArrayListUnmanaged(u64) = .empty,
    applied_acknowledged: u64 = 0,
    applied_attempted: u64 = 0,
    /// Delivered in the recovery that is going on, by pass.
    delivered: [2]std.ArrayListUnmanaged(Attempt) = .{ .empty, .empty },
    wrong: bool = false,
    lives: u64 = 0,
    commits: u64 = 0,

    const allocator = std.heap.page_allocator;

    fn execute(settings: Settings) (Violation || error{OutOfMemory})!Counts {
        var arena_state = std.heap.ArenaAllocator.init(allocator);
        defer arena_state.deinit();
        const arena = arena_state.allocator();
        const memory = try allocator.alignedAlloc(u8, .fromByteUnits(4096), segment_bytes);
        defer allocator.free(memory);
        var run = Run{
            .settings = settings,
            .disk = .init(allocator, settings.seed),
            .prng = .init(settings.seed ^ 0x5eed),
            .memory = memory,
            .group = .init(memory),
        };
        defer run.disk.deinit();
        defer if (run.log) |log| log.close();
        run.disk.ignore_durable_writes = settings.ignore_durable_writes;
        if (settings.ignore_checkpoint_writes) run.disk.ignore_durable_writes_of = "checkpoint";
        const lives_max = 8;
        while (run.lives < lives_max) : (run.lives += 1) try run.live(arena);
        return .{ .commits = run.commits, .records = run.acknowledged.items.len, .operations = run.disk.operation_count };
    }

    fn live(run: *Run, arena: std.mem.Allocator) !void {
        const random = run.prng.random();
        const faulty = run.settings.faults and random.boolean();
        if (random.uintLessThan(u8, 4) > 0) run.disk.cut_at = run.disk.operation_count + 1 + random.uintLessThan(u64, 80);
        if (faulty) {
            run.disk.input_output_per_mille = 30;
            run.disk.no_space_per_mille = 30;
        }
        try run.start(arena, faulty);
        if (run.log != null) {
            for (0..random.uintLessThan(u32, 60)) |_| {
                if (run.disk.is_off) break;
                if (faulty and random.uintLessThan(u8, 40) == 0) run.disk.failing_operations_left = random.uintLessThan(u64, 8);
                try run.step(arena, faulty);
            }
            run.log.?.close();
            run.log = null;
        }
        run.disk.input_output_per_mille = 0;
        run.disk.no_space_per_mille = 0;
        run.disk.restart(switch (random.uintLessThan(u8, 8)) {
            0, 1 => .process,
            2 => .power_keeps_nothing,
            3 => .power_keeps_all,
            else => .power,
        });
    }

    fn step(run: *Run, arena: std.mem.Allocator, faulty: bool) !void {
        const random = run.prng.random();
        const log = run.log.?;
        switch (random.uintLessThan(u8, 10)) {
            0...5 => try run.commit(arena, faulty),
            6, 7 => log.prepareNextSegment() catch if (!faulty and !run.disk.is_off) return error.Refused,
            8 => {
                const lsn = run.applied_acknowledged + random.uintAtMost(u64, log.durableLsn() - run.applied_acknowledged);
                run.applied_attempted = @max(run.applied_attempted, lsn);
                if (log.checkpoint(lsn)) {
                    run.applied_acknowledged = lsn;
                } else |_| if (!faulty and !run.disk.is_off) return error.Refused;
            },
            9 => log.collect(.{ .context = run, .ask = mayRemove }) catch if (!faulty and !run.disk.is_off) return error.Refused,
            else => unreachable,
        }
    }

    fn mayRemove(context: *anyopaque, segment: *const log_module.SegmentSummary) bool {
        const run: *Run = @ptrCast(@alignCast(context));
        return segment.first_lsn <= segment.last_lsn and run.prng.random().uintLessThan(u8, 4) > 0;
    }

    fn commit(run: *Run, arena: std.mem.Allocator, faulty: bool) !void {
        const random = run.prng.random();
        const log = run.log.?;
        run.group.begin(log);
        const count = 1 + random.uintLessThan(usize, 6);
        var tags: [8]u64 = undefined;
        var appended: usize = 0;
        for (0..count) |_| {
            const tag = run.next_tag;
            const slot = run.group.append(.{ .kind = .write, .ring_uuid = @splat(1), .position = tag, .file_id = tag, .length_bytes = lengthOf(tag) }) orelse break;
            fill(slot.payload, tag);
            slot.header.payload_checksum = crc32c(0, slot.payload);
            if (random.uintLessThan(u8, 16) == 0) {
                run.group.cancelLast();
                continue;
            }
            tags[appended] = tag;
            appended += 1;
            run.next_tag += 1;
            try run.attempts.append(arena, slot.lsn);
        }
        if (run.group.isEmpty()) return;
        const tries_max = 4;
        for (0..tries_max) |_| {
            if (log.commit(&run.group)) {
                run.commits += 1;
                for (tags[0..appended]) |tag| try run.acknowledged.append(arena, tag);
                return;
            } else |_| {
                if (run.disk.is_off) return;
                if (!faulty) return error.Refused;
                // Tried again unchanged, perhaps after maintenance, or dropped: its LSNs go to the next ones.
                if (random.boolean()) return;
                if (random.boolean()) log.prepareNextSegment() catch {};
            }
        }
    }

    /// Opens and recovers, and compares with what is known. `log` stays null where the disk did not allow it.
    fn start(run: *Run, arena: std.mem.Allocator, faulty: bool) !void {
        for (&run.delivered) |*pass| pass.clearRetainingCapacity();
        run.wrong = false;
        const log = Log.open(allocator, run.disk.storage(), path, options) catch |err| {
            if (err == error.OutOfMemory) return error.OutOfMemory;
            if (!run.disk.is_off and !faulty) return error.Refused;
            return;
        };
        var context = Context{ .run = run, .arena = arena };
        const recovery = log.recover(.{ .context = &context, .visit = Context.visit }) catch |err| {
            log.close();
            if (err == error.OutOfMemory) return error.OutOfMemory;
            if (run.wrong) return error.Wrong;
            if (!run.disk.is_off and !faulty) return error.Refused;
            return;
        };
        run.log = log;
        errdefer if (!run.settings.quiet) {
            std.debug.print("\nlife {d}: checkpoint {d}, recovered to {d}, acknowledged to {d}\n", .{ run.lives, recovery.applied_lsn, log.durableLsn(), run.acknowledged.items.len });
            for (recovery.missing) |range| std.debug.print("missing: {d} to {d}\n", .{ range.first, range.last });
            for (recovery.notes) |note| std.debug.print("note: {s}: {s}\n", .{ note.name, note.text });
        };
        if (run.wrong) return error.Wrong;
        if (recovery.missing.len > 0) return error.FalseAlarm;
        if (!run.settings.faults and recovery.notes.len > 0 and !run.disk.is_off) return error.FalseAlarm;
        if (recovery.applied_lsn < run.applied_acknowledged or recovery.applied_lsn > run.applied_attempted) return error.CheckpointWrong;
        run.applied_acknowledged = recovery.applied_lsn;

        const survey = run.delivered[0].items;
        const apply = run.delivered[1].items;
        if (survey.len != apply.len) return error.PassesDiffer;
        for (survey, apply) |a, b| if (a.lsn != b.lsn or a.tag != b.tag) return error.PassesDiffer;
        for (survey, 1..) |record, index| {
            if (record.lsn != recovery.applied_lsn + index) return error.OutOfOrder;
            if (run.attempts.items[record.tag - 1] != record.lsn) return error.Wrong;
            if (record.lsn <= run.acknowledged.items.len) {
                if (run.acknowledged.items[record.lsn - 1] != record.tag) return error.Wrong;
            } else {
                // Nobody was told, but it is there, and from now on it must stay.
                try run.acknowledged.append(arena, record.tag);
            }
        }
        if (recovery.applied_lsn + survey.len != run.acknowledged.items.len) return error.Lost;
        if (log.durableLsn() != run.acknowledged.items.len) return error.Lost;
        if (!run.settings.faults and !run.disk.is_off) {
            const names = try run.disk.list(arena, path, ".wal");
            if (names.len * segment_bytes != log.bytesHeld()) return error.AccountsWrong;
        }
    }

    const Context = struct {
        run: *Run,
        arena: std.mem.Allocator,

        fn visit(context: *anyopaque, pass: log_module.Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
            const self: *Context = @ptrCast(@alignCast(context));
            const tag = header.file_id;
            var expected: [length_bytes_max]u8 = undefined;
            const known = tag >= 1 and tag < self.run.next_tag and header.position == tag and payload.len == lengthOf(tag);
            if (known) fill(expected[0..payload.len], tag);
            if (!known or !std.mem.eql(u8, expected[0..payload.len], payload)) {
                self.run.wrong = true;
                return error.VisitorStopped;
            }
            self.run.delivered[@intFromEnum(pass)].append(self.arena, .{ .lsn = header.lsn, .tag = tag }) catch return error.VisitorStopped;
        }
    };
};

const Counts = struct { commits: u64, records: u64, operations: u64 };

const length_bytes_max = 9000;

fn lengthOf(tag: u64) u32 {
    const drawn = std.hash.int(tag);
    return @intCast(switch (drawn % 4) {
        0 => drawn / 4 % 16,
        1, 2 => drawn / 4 % 1500,
        else => drawn / 4 % length_bytes_max,
    });
}

fn fill(payload: []u8, tag: u64) void {
    var prng = std.Random.DefaultPrng.init(tag);
    prng.random().bytes(payload);
}

const seed_count_default = 250;

/// For long runs: ELGATE_TEST_SEEDS=20000.
fn seedCount() u64 {
    const text = std.posix.getenv("ELGATE_TEST_SEEDS") orelse return seed_count_default;
    return std.fmt.parseInt(u64, text, 10) catch @panic("ELGATE_TEST_SEEDS is not a number");
}

fn expectAllHold(faults: bool, first_seed: u64) !void {
    var commits: u64 = 0;
    const seed_count = seedCount();
    for (0..seed_count) |index| {
        const seed = first_seed + index;
        const counts = Run.execute(.{ .seed = seed, .faults = faults }) catch |err| {
            std.debug.print("\nsimulation: {s} with seed {d} (faults: {})\n", .{ @errorName(err), seed, faults });
            return err;
        };
        commits += counts.commits;
    }
    // A simulation in which nothing happens holds too.
    try std.testing.expect(commits > seed_count * 10);
}

fn expectNoticed(settings: Settings) !void {
    var varied = settings;
    varied.quiet = true;
    for (0..seedCount()) |index| {
        varied.seed = settings.seed + index;
        _ = Run.execute(varied) catch |err| switch (err) {
            error.OutOfMemory => return err,
            else => return,
        };
    }
    return error.NotNoticed;
}

/// A new one for each run, so that many runs see more; printed where it fails, and to be had again by setting it.
fn firstSeed() u64 {
    if (std.posix.getenv("ELGATE_TEST_SEED")) |text| return std.fmt.parseInt(u64, text, 10) catch @panic("ELGATE_TEST_SEED is not a number");
    return std.crypto.random.int(u32);
}

test "whatever cuts a life short, what was acknowledged comes back, in order, once" {
    try expectAllHold(false, firstSeed());
}

test "the same where writes and syncs fail now and then" {
    try expectAllHold(true, firstSeed());
}

test "the simulation notices commits that are not durable" {
    try expectNoticed(.{ .seed = 1, .faults = false, .ignore_durable_writes = true });
}

test "the simulation notices segments that are removed before the checkpoint is durable" {
    try expectNoticed(.{ .seed = 1, .faults = false, .ignore_checkpoint_writes = true });
}

test "the simulation notices payloads whose checksum nobody looks at" {
    reader_module.mutants.payload_checksum_unchecked = true;
    defer reader_module.mutants.payload_checksum_unchecked = false;
    try expectNoticed(.{ .seed = 1, .faults = false });
}

test "the simulation notices tails of older segments that are not voided" {
    reader_module.mutants.nothing_voided = true;
    defer reader_module.mutants.nothing_voided = false;
    try expectNoticed(.{ .seed = 1, .faults = true });
}

test "the simulation notices a tail that is synced after a failed write instead of being written anew" {
    reader_module.mutants.tail_only_synced = true;
    defer reader_module.mutants.tail_only_synced = false;
    try expectNoticed(.{ .seed = 1, .faults = true });
}
