//! The log on a simulated disk (simulated_disk.zig has the model of its faults), through eight lives in a row, all
//! from one seed: each recovers, goes on writing, prepares segments, makes checkpoints, removes and recycles what is
//! below, and is cut short by a power cut or a kill at some operation, or by nothing.
//!
//! A seed's profile says what its disk does beyond cuts and kills:
//!
//! ```
//! sound     nothing: then there is no complaint either, not even a note
//! faulty    EIO and ENOSPC from any operation, failed writes that land late
//! damaged   sectors that were on their way in a power cut become garbage or land elsewhere; between lives, bytes of the
//!           log change or cannot be read any more
//! ```
//!
//! What must hold after each recovery:
//!
//! - The log starts. (Not while the disk fails; but then once it does not.)
//! - What was acknowledged is delivered as it was, or named as missing; and it is missing only where damage hit a
//!   place that held it, or its group's header. In profiles without damage nothing is missing.
//! - No record twice, none out of order, none that was not committed under that LSN. What was not acknowledged may be
//!   delivered, behind all that was; from then on it counts as acknowledged.
//! - Both passes deliver the same; so does a second recovery, which also names the same as missing.
//! - The cursor is never above what is durable in the targets and, without damage, never below what was acknowledged.
//!   (Where the whole checkpoint is gone it is what the oldest segment says that is left, and older ones that damage has
//!   taken whole are not missed.)
//! - The receipt on the disk names the same records as the recovery.
//! - No segment is in the history, or gone from the log in another way, before the cursor has passed it.
//!
//! What the log cannot be asked: the group with the last acknowledged record is not hit by damage, since nothing else
//! on the disk knows that it was there (where that group is gone, the checkpoint alone does, and is not hit); nor are
//! both ends of one segment, or both a header and the only group that could stand in for it together with its last
//! block. And no segment becomes another one's: of two that its ends name, the one with more groups, or else the last
//! block, goes on telling whose it is.

const std = @import("std");
const assert = std.debug.assert;
const wal = @import("../format/wal.zig");
const crc32c = @import("../format/checksum.zig").crc32c;
const reader_module = @import("../engine/wal/reader.zig");
const log_module = @import("../engine/wal/log.zig");
const history = @import("../engine/wal/history.zig");
const checkpoint_module = @import("../engine/wal/checkpoint.zig");
const storage_module = @import("../engine/wal/storage.zig");
const simulated_disk = @import("simulated_disk.zig");
const SimulatedDisk = simulated_disk.SimulatedDisk;
const sector_bytes = simulated_disk.sector_bytes;
const Log = log_module.Log;
const Group = log_module.Group;
const LsnRange = log_module.LsnRange;

const path = "wal/orders";
const segment_bytes = 48 * 1024;
const options = log_module.Options{ .segment_bytes = segment_bytes, .log_bytes_max = 1 << 30, .zero_bytes = 8 * 1024 };
const history_path = path ++ "/" ++ history.directory_name;
const lives_max = 8;

pub const Violation = error{
    /// Acknowledged, and neither delivered nor named as missing.
    Lost,
    /// Named as missing, and nothing happened to it.
    MissingWithoutCause,
    /// Named as missing, and delivered; or never acknowledged.
    MissingAndThere,
    /// Delivered, and not what was committed under that LSN.
    Wrong,
    OutOfOrder,
    PassesDiffer,
    SecondRecoveryDiffers,
    ReceiptWrong,
    /// The log says that something is damaged, or does not belong, on a disk that did nothing wrong.
    FalseAlarm,
    /// The cursor has passed what is durable in the targets.
    CursorAhead,
    /// A cursor that was acknowledged is gone.
    CursorLost,
    /// A segment is in the history that the cursor has not passed.
    ForgottenTooEarly,
    /// A commit or an open failed on a disk that did not.
    Refused,
    AccountsWrong,
};

pub const Profile = enum { sound, faulty, damaged };

pub fn profileOf(seed: u64) Profile {
    return @enumFromInt(std.hash.int(seed) % 3);
}

pub const Settings = struct {
    seed: u64,
    /// The next process is let in before the last write of the one before has landed.
    lock_is_ignored: bool = false,
    /// A violation is what is hoped for: say nothing of it.
    quiet: bool = false,
    /// Say what happens, life by life.
    tells: bool = false,
};

pub const Counts = struct {
    commits: u64 = 0,
    records: u64 = 0,
    operations: u64 = 0,
    missing: u64 = 0,
    /// Segments that a start has found in the history.
    kept: u64 = 0,
    strikes: u64 = 0,

    pub fn add(counts: *Counts, other: Counts) void {
        inline for (std.meta.fields(Counts)) |field| @field(counts, field.name) += @field(other, field.name);
    }
};

/// Memory for many runs, one after the other: most of the time would go into giving it back and getting it again.
pub const Memory = struct {
    run: std.heap.ArenaAllocator = .init(std.heap.page_allocator),
    disk: std.heap.ArenaAllocator = .init(std.heap.page_allocator),

    pub fn deinit(memory: *Memory) void {
        memory.run.deinit();
        memory.disk.deinit();
    }
};

pub fn run(memory: *Memory, settings: Settings) (Violation || error{OutOfMemory})!Counts {
    _ = memory.run.reset(.retain_capacity);
    _ = memory.disk.reset(.retain_capacity);
    const arena = memory.run.allocator();
    var simulation = Simulation{
        .settings = settings,
        .profile = profileOf(settings.seed),
        .arena = arena,
        .disk = .init(memory.disk.allocator(), settings.seed),
        .prng = .init(settings.seed ^ 0x5eed),
        .group = .init(try arena.alignedAlloc(u8, .fromByteUnits(4096), segment_bytes)),
    };
    defer simulation.disk.deinit();
    defer if (simulation.log) |log| log.close();
    simulation.disk.direct = simulation.prng.random().boolean();
    simulation.disk.lock_is_ignored = settings.lock_is_ignored;
    simulation.disk.shears = simulation.profile == .damaged;
    simulation.disk.misdirects = simulation.profile == .damaged;
    while (simulation.lives < lives_max) : (simulation.lives += 1) try simulation.live();
    simulation.counts.records = simulation.acknowledged.items.len;
    simulation.counts.operations = simulation.disk.operation_count;
    return simulation.counts;
}

/// What one commit attempt put under an LSN. `tag` stands in the record and determines its payload.
const Attempt = struct { lsn: u64, tag: u64 };

/// Instead of a tag: durable, says the log, but nobody was told what it is.
const nobody_knows = 0;

const Bytes = struct {
    start: u64,
    end: u64,

    fn overlaps(a: Bytes, b: Bytes) bool {
        return a.start < b.end and b.start < a.end;
    }
};

/// A place on the disk that holds a record.
const Copy = struct { name: []const u8, lsn: u64, group: Bytes, group_header: Bytes, record: Bytes };

const Simulation = struct {
    settings: Settings,
    profile: Profile,
    arena: std.mem.Allocator,
    disk: SimulatedDisk,
    /// Not the disk's: so that what the test does not depend on what the log asks of the disk.
    prng: std.Random.DefaultPrng,
    log: ?*Log = null,
    group: Group,
    lives: u64 = 0,
    counts: Counts = .{},
    /// The disk fails now and then in this life.
    failing: bool = false,
    /// The thread of this life that maintains hangs in the kernel.
    maintenance_hangs: bool = false,

    next_tag: u64 = 1,
    /// By LSN - 1: the tag of what is acknowledged.
    acknowledged: std.ArrayListUnmanaged(u64) = .empty,
    /// By LSN - 1: damage hit a place that held it.
    excused: std.ArrayListUnmanaged(bool) = .empty,
    /// By tag - 1: the LSN it was tried under.
    attempts: std.ArrayListUnmanaged(u64) = .empty,
    cursor_acknowledged: u64 = 0,
    /// Everything up to here is in the targets, as programs see them, and on their disk.
    targets_cached: u64 = 0,
    targets_durable: u64 = 0,
    /// Neither of the checkpoint's blocks was whole when the log was opened, for the first time since a recovery.
    checkpoint_is_gone: bool = false,
    /// Delivered in the recovery that is going on, by pass.
    delivered: [2]std.ArrayListUnmanaged(Attempt) = .{ .empty, .empty },
    wrong: bool = false,

    fn live(sim: *Simulation) !void {
        const random = sim.prng.random();
        sim.failing = sim.profile == .faulty and random.boolean();
        sim.maintenance_hangs = false;
        // Often during the recovery.
        if (random.uintLessThan(u8, 4) > 0) sim.disk.cut_at = sim.disk.operation_count + 1 + random.uintLessThan(u64, if (random.uintLessThan(u8, 3) == 0) 16 else 160);
        if (sim.failing) {
            sim.disk.input_output_per_mille = 30;
            sim.disk.no_space_per_mille = 30;
            sim.disk.read_per_mille = 30;
        }
        try sim.start();
        if (sim.log != null and random.uintLessThan(u8, 4) == 0) try sim.startAgain();
        var is_shot = false;
        if (sim.log) |log| {
            for (0..random.uintLessThan(u32, 100)) |_| {
                if (sim.disk.is_off) break;
                if (sim.failing and random.uintLessThan(u8, 40) == 0) sim.disk.failing_operations_left = random.uintLessThan(u64, 8);
                try sim.step();
            }
            // The disk breaks, and the daemon is shot for it: what the last commit left is in the page cache.
            if (sim.failing and !sim.disk.is_off and random.boolean()) {
                sim.disk.failing_operations_left = 8;
                try sim.commit();
                is_shot = true;
            }
            log.close();
            sim.log = null;
        }
        sim.disk.input_output_per_mille = 0;
        sim.disk.no_space_per_mille = 0;
        sim.disk.read_per_mille = 0;
        const crash: SimulatedDisk.Crash = if (is_shot) .process else switch (random.uintLessThan(u8, 8)) {
            0, 1, 2 => .process,
            3 => .power_keeps_nothing,
            4 => .power_keeps_all,
            else => .power,
        };
        if (sim.settings.tells) sim.say("life {d} ends at operation {d}{s}: {s}, {d} acknowledged", .{ sim.lives, sim.disk.operation_count, if (sim.disk.is_off) " (cut)" else "", @tagName(crash), sim.acknowledged.items.len });
        sim.disk.restart(crash);
        if (crash != .process) sim.targets_cached = sim.targets_durable;
        if (sim.profile == .damaged) try sim.strikeAll();
        if (sim.settings.tells) try sim.tellGroups();
    }

    fn step(sim: *Simulation) !void {
        const random = sim.prng.random();
        const log = sim.log.?;
        const drawn = random.uintLessThan(u8, 12);
        if (drawn < 7 or sim.maintenance_hangs) return sim.commit();
        if (random.uintLessThan(u8, 30) == 0) sim.disk.hangs_in = random.uintLessThan(u64, 6);
        switch (drawn) {
            7 => if (random.boolean()) {
                log.trimHistory() catch if (!sim.mayFail()) return error.Refused;
            } else {
                log.prepareNextSegment() catch if (!sim.mayFail()) return error.Refused;
            },
            8 => log.prepareNextSegment() catch if (!sim.mayFail()) return error.Refused,
            9, 10 => {
                const lsn = sim.cursor_acknowledged + random.uintAtMost(u64, log.durableLsn() - sim.cursor_acknowledged);
                if (checkpoint_module.run(log, lsn, Steps{ .sim = sim })) {
                    sim.cursor_acknowledged = lsn;
                } else |err| {
                    if (!sim.mayFail()) return error.Refused;
                    if (err == error.SegmentsNotRemoved) sim.cursor_acknowledged = lsn;
                }
            },
            11 => log.collect(.{ .context = sim, .ask = mayRemove }) catch if (!sim.mayFail()) return error.Refused,
            else => unreachable,
        }
        // It will not come back before the process is killed: the worker goes on without.
        sim.maintenance_hangs = sim.disk.is_hung;
        sim.disk.threadGone();
    }

    fn mayFail(sim: *const Simulation) bool {
        return sim.failing or sim.disk.is_off or sim.disk.is_hung;
    }

    const Steps = struct {
        sim: *Simulation,

        pub fn syncTargets(self: Steps) bool {
            if (!self.sim.disk.operationElsewhere()) return false;
            self.sim.targets_durable = self.sim.targets_cached;
            return true;
        }

        pub fn cursorWritten(_: Steps) void {}
        pub fn cursorFailed(_: Steps, _: storage_module.Error) void {}
        pub fn removalFailed(_: Steps, _: storage_module.Error) void {}

        pub fn mayRemove(self: Steps) log_module.MayRemove {
            return .{ .context = self.sim, .ask = Simulation.mayRemove };
        }
    };

    fn mayRemove(context: *anyopaque, segment: *const log_module.SegmentSummary) bool {
        const sim: *Simulation = @ptrCast(@alignCast(context));
        _ = segment;
        return sim.prng.random().uintLessThan(u8, 4) > 0;
    }

    fn commit(sim: *Simulation) !void {
        const random = sim.prng.random();
        const log = sim.log.?;
        sim.group.begin(log);
        const count = 1 + random.uintLessThan(usize, 6);
        var tags: [8]u64 = undefined;
        var appended: usize = 0;
        for (0..count) |_| {
            const tag = sim.next_tag;
            const slot = sim.group.append(.{ .kind = .write, .ring_uuid = @splat(1), .position = tag, .file_id = tag, .offset = std.hash.int(tag), .length_bytes = lengthOf(tag), .argument = @truncate(tag), .time_ns = tag }) orelse break;
            fill(slot.payload, tag);
            slot.header.payload_checksum = crc32c(0, slot.payload);
            if (random.uintLessThan(u8, 16) == 0) {
                sim.group.cancelLast();
                continue;
            }
            tags[appended] = tag;
            appended += 1;
            sim.next_tag += 1;
            try sim.attempts.append(sim.arena, slot.lsn);
        }
        if (sim.group.isEmpty()) return;
        const commits_max = 4;
        for (0..commits_max) |_| {
            if (log.commit(&sim.group)) {
                sim.counts.commits += 1;
                for (tags[0..appended]) |tag| try sim.acknowledge(tag);
                sim.targets_cached = sim.acknowledged.items.len;
                return;
            } else |_| {
                if (sim.disk.is_off) return;
                if (!sim.failing) return error.Refused;
                // Tried again unchanged, perhaps after maintenance, or dropped: its LSNs go to the next ones.
                if (random.boolean()) return;
                if (random.boolean() and !sim.maintenance_hangs) log.prepareNextSegment() catch {};
            }
        }
    }

    fn excuse(sim: *Simulation, lsn: u64) void {
        sim.excused.items[@intCast(lsn - 1)] = true;
    }

    fn acknowledge(sim: *Simulation, tag: u64) !void {
        try sim.acknowledged.append(sim.arena, tag);
        try sim.excused.append(sim.arena, false);
    }

    /// Opens and recovers, and compares with what is known. `log` stays null where the disk did not allow it.
    fn start(sim: *Simulation) !void {
        for (&sim.delivered) |*pass| pass.clearRetainingCapacity();
        sim.wrong = false;
        var explanation = log_module.Explanation{};
        var with = options;
        with.explanation = &explanation;
        if (sim.profile == .damaged and !sim.hasCheckpoint()) sim.checkpoint_is_gone = true;
        // The disk's clock moves by 1000 ns each time somebody looks at it. Mostly some of the history stays.
        with.age_max_ns = switch (sim.prng.random().uintLessThan(u8, 4)) {
            0 => 0,
            1 => std.math.maxInt(u64),
            else => sim.prng.random().uintLessThan(u64, 500 * 1000),
        };
        // To the segment's end mostly: what zero-writing fails in keeps commits from failing.
        if (sim.prng.random().uintLessThan(u8, 4) == 0) with.zero_ahead_bytes = 16 * 1024;
        const log = Log.open(sim.arena, sim.disk.storage(), path, with) catch |err| {
            if (err == error.OutOfMemory) return error.OutOfMemory;
            if (!sim.mayFail()) {
                sim.say("open: {s}: {s}", .{ @errorName(err), explanation.text() });
                return error.Refused;
            }
            return;
        };
        const recovery = log.recover(.{ .context = sim, .visit = visit }) catch |err| {
            defer log.close();
            if (err == error.OutOfMemory) return error.OutOfMemory;
            if (sim.wrong) return error.Wrong;
            if (!sim.mayFail()) {
                sim.say("recover: {s}: {s}", .{ @errorName(err), log.explanation.text() });
                return error.Refused;
            }
            return;
        };
        sim.log = log;
        errdefer {
            sim.say("life {d}: checkpoint {d}, recovered to {d}, acknowledged to {d}", .{ sim.lives, recovery.applied_lsn, log.durableLsn(), sim.acknowledged.items.len });
            for (recovery.missing) |range| sim.say("missing: {d} to {d}", .{ range.first, range.last });
            for (recovery.notes) |note| sim.say("note: {s}: {s}", .{ note.name, note.text });
        }
        if (sim.settings.tells) {
            sim.say("life {d}: cursor {d}, {d} delivered, {d} missing, durable to {d}", .{ sim.lives, recovery.applied_lsn, sim.delivered[0].items.len, recovery.missing_records, log.durableLsn() });
            var next = log.segments;
            while (next) |segment| : (next = segment.next) sim.say("  segment {s}: id {x}, epoch {d}, first {d}, last {d}, sealed {d}", .{ segment.name(), segment.id, segment.epoch, segment.first_lsn, segment.last_lsn.load(.monotonic), segment.sealed_lsn });
        }
        sim.counts.missing += recovery.missing_records;
        try sim.compare(recovery);
        if (log.durableLsn() != sim.acknowledged.items.len) return error.Lost;
        sim.cursor_acknowledged = recovery.applied_lsn;
        sim.targets_cached = sim.acknowledged.items.len;
        if (!sim.mayFail()) try sim.checkReceipt(recovery);
        if (sim.profile == .sound and !sim.disk.is_off) {
            if (recovery.notes.len > 0) return error.FalseAlarm;
            const names = try sim.disk.list(sim.arena, path, ".wal");
            const kept = try sim.disk.list(sim.arena, history_path, ".wal");
            if ((names.len + kept.len) * segment_bytes != log.bytesHeld()) return error.AccountsWrong;
        }
        try sim.checkHistory(recovery);
    }

    /// What damage does there is nobody's loss; but there is none that is of another time.
    fn checkHistory(sim: *Simulation, recovery: *const log_module.Recovery) !void {
        for (try sim.disk.list(sim.arena, history_path, ".wal")) |name| {
            sim.counts.kept += 1;
            const header = switch (reader_module.parseSegmentHeader(sim.disk.contents(history_path, name).?)) {
                .valid => |header| header,
                else => continue,
            };
            if (@max(header.first_lsn, header.sealed_lsn) > recovery.applied_lsn) return error.ForgottenTooEarly;
        }
    }

    fn compare(sim: *Simulation, recovery: *const log_module.Recovery) !void {
        if (sim.wrong) return error.Wrong;
        if (recovery.applied_lsn > sim.targets_durable) {
            if (!sim.checkpoint_is_gone or recovery.applied_lsn > sim.excused.items.len) return error.CursorAhead;
            for (sim.excused.items[sim.targets_durable..recovery.applied_lsn]) |is_excused| if (!is_excused) return error.CursorAhead;
            sim.targets_durable = recovery.applied_lsn; // given up for lost
        }
        sim.checkpoint_is_gone = false;
        if (recovery.applied_lsn < sim.cursor_acknowledged and sim.profile != .damaged) return error.CursorLost;
        const survey = sim.delivered[0].items;
        const apply = sim.delivered[1].items;
        if (survey.len != apply.len) return error.PassesDiffer;
        for (survey, apply) |a, b| if (a.lsn != b.lsn or a.tag != b.tag) return error.PassesDiffer;

        const known = sim.acknowledged.items.len;
        var missing = MissingLsns{ .ranges = recovery.missing };
        var expected = recovery.applied_lsn + 1;
        for (survey) |record| {
            if (record.lsn < expected) return error.OutOfOrder;
            while (expected < record.lsn) : (expected += 1) {
                if (sim.profile == .damaged and expected == sim.acknowledged.items.len + 1) {
                    try sim.acknowledge(nobody_knows); // see below
                    sim.excuse(expected);
                }
                try sim.expectMissing(expected, &missing);
            }
            if (missing.next()) |lsn| if (lsn <= record.lsn) return error.MissingAndThere;
            if (sim.attempts.items[record.tag - 1] != record.lsn) return error.Wrong;
            if (record.lsn <= known) {
                const tag = &sim.acknowledged.items[record.lsn - 1];
                if (tag.* == nobody_knows) tag.* = record.tag;
                if (tag.* != record.tag) return error.Wrong;
            } else {
                // Nobody was told, but it is there, and from now on it must stay.
                if (record.lsn != sim.acknowledged.items.len + 1) return error.OutOfOrder;
                try sim.acknowledge(record.tag);
            }
            expected = record.lsn + 1;
        }
        while (expected <= known) : (expected += 1) try sim.expectMissing(expected, &missing);
        while (sim.profile == .damaged) {
            // A recovery that was cut short had made it durable, which nobody heard of, and then it was hit.
            if (missing.next() != sim.acknowledged.items.len + 1) break;
            try sim.acknowledge(nobody_knows);
            sim.excuse(sim.acknowledged.items.len);
            missing.taken = sim.acknowledged.items.len;
        }
        if (missing.next() != null) return error.MissingAndThere;
    }

    fn expectMissing(sim: *Simulation, lsn: u64, missing: *MissingLsns) !void {
        if (lsn > sim.acknowledged.items.len) return error.OutOfOrder;
        const named = missing.next() orelse return error.Lost;
        if (named > lsn) return error.Lost;
        if (named < lsn) return error.MissingAndThere;
        missing.taken = named;
        if (sim.excused.items[lsn - 1]) return;
        sim.say("LSN {d}", .{lsn});
        for (try sim.findCopies()) |copy| {
            if (copy.lsn == lsn) sim.say("  copy in {s}: group {d} to {d}, record {d} to {d}", .{ copy.name, copy.group.start, copy.group.end, copy.record.start, copy.record.end });
        }
        return error.MissingWithoutCause;
    }

    /// What a recovery names as missing, LSN by LSN.
    const MissingLsns = struct {
        ranges: []const LsnRange,
        taken: u64 = 0,

        fn next(missing: *MissingLsns) ?u64 {
            while (missing.ranges.len > 0 and missing.ranges[0].last <= missing.taken) missing.ranges = missing.ranges[1..];
            if (missing.ranges.len == 0) return null;
            return @max(missing.ranges[0].first, missing.taken + 1);
        }
    };

    fn checkReceipt(sim: *Simulation, recovery: *const log_module.Recovery) !void {
        if (recovery.missing.len == 0) {
            if (recovery.receipt_name.len > 0) return error.ReceiptWrong;
            return;
        }
        const text = sim.disk.contents(path ++ "/" ++ log_module.receipts_name, recovery.receipt_name) orelse return error.ReceiptWrong;
        const Receipt = struct { missing_records: u64, missing: []const LsnRange };
        const receipt = std.json.parseFromSliceLeaky(Receipt, sim.arena, text, .{ .ignore_unknown_fields = true }) catch return error.ReceiptWrong;
        if (receipt.missing_records != recovery.missing_records or receipt.missing.len != recovery.missing.len) return error.ReceiptWrong;
        for (receipt.missing, recovery.missing) |a, b| if (a.first != b.first or a.last != b.last) return error.ReceiptWrong;
    }

    /// A second recovery right behind the first.
    fn startAgain(sim: *Simulation) !void {
        const first = try sim.arena.dupe(Attempt, sim.delivered[0].items);
        const missing = try sim.arena.dupe(LsnRange, sim.log.?.recovery.missing);
        sim.log.?.close();
        sim.log = null;
        sim.disk.settle();
        try sim.start();
        const log = sim.log orelse return;
        const second = sim.delivered[0].items;
        errdefer {
            sim.say("life {d}: delivered {d}, then {d}, from {d}", .{ sim.lives, first.len, second.len, log.recovery.applied_lsn + 1 });
            if (first.len > 0) sim.say("before from {d}", .{first[0].lsn});
            for (missing) |range| sim.say("missing before: {d} to {d}", .{ range.first, range.last });
            for (log.recovery.missing) |range| sim.say("missing now: {d} to {d}", .{ range.first, range.last });
            for (log.recovery.notes) |note| sim.say("note: {s}: {s}", .{ note.name, note.text });
        }
        if (first.len != second.len or missing.len != log.recovery.missing.len) return error.SecondRecoveryDiffers;
        for (first, second) |a, b| if (a.lsn != b.lsn or a.tag != b.tag) return error.SecondRecoveryDiffers;
        for (missing, log.recovery.missing) |a, b| if (a.first != b.first or a.last != b.last) return error.SecondRecoveryDiffers;
    }

    fn visit(context: *anyopaque, pass: log_module.Pass, header: *const wal.RecordHeader, payload: []const u8) error{VisitorStopped}!void {
        const sim: *Simulation = @ptrCast(@alignCast(context));
        const tag = header.file_id;
        var expected: [length_bytes_max]u8 = undefined;
        const known = tag >= 1 and tag < sim.next_tag and header.position == tag and payload.len == lengthOf(tag) and
            header.kind == @intFromEnum(wal.Kind.write) and header.offset == std.hash.int(tag) and header.argument == @as(u32, @truncate(tag)) and header.time_ns == tag;
        if (known) fill(expected[0..payload.len], tag);
        if (!known or !std.mem.eql(u8, expected[0..payload.len], payload)) {
            sim.wrong = true;
            return error.VisitorStopped;
        }
        sim.delivered[@intFromEnum(pass)].append(sim.arena, .{ .lsn = header.lsn, .tag = tag }) catch return error.VisitorStopped;
    }

    fn say(sim: *const Simulation, comptime format: []const u8, arguments: anytype) void {
        if (!sim.settings.quiet) std.debug.print("    " ++ format ++ "\n", arguments);
    }

    // Damage.

    /// Puts what the power cut sent astray somewhere, and damages something.
    fn strikeAll(sim: *Simulation) !void {
        const random = sim.prng.random();
        const copies = try sim.findCopies();
        for (copies) |copy| {
            // One end was hit before, and now the other was on its way when the power went.
            if (!sim.hasAnEnd(copy.name)) sim.excuse(copy.lsn);
        }
        for (sim.disk.misdirected.items) |write| try sim.misdirect(copies, write);
        for (0..random.uintLessThan(usize, 4)) |_| {
            switch (random.enumValue(enum { header, anything, stray })) {
                .header => try sim.strikeHeader(copies),
                .anything => try sim.strikeAnything(copies),
                .stray => try sim.repeatElsewhere(copies),
            }
        }
    }

    const tries_max = 20;

    /// To the same place of another file, to another place of the same file, or anywhere.
    fn misdirect(sim: *Simulation, copies: []const Copy, write: simulated_disk.Misdirected) !void {
        const random = sim.prng.random();
        const kind = random.enumValue(enum { other_file, other_place, anywhere });
        for (0..tries_max) |_| {
            const name = try sim.anyFile() orelse return;
            const is_own = sim.disk.isFile(path, name, write.inode);
            if (is_own == (kind == .other_file) and kind != .anywhere) continue;
            const size: u64 = sim.disk.contents(path, name).?.len;
            if (write.bytes.len > size) continue;
            const unit: u64 = if (kind != .anywhere or random.boolean()) wal.block_size else sector_bytes;
            const start_ = if (kind == .other_file) write.offset else random.uintAtMost(u64, (size - write.bytes.len) / unit) * unit;
            if (start_ + write.bytes.len > size) continue;
            if (try sim.strike(copies, name, .{ .start = start_, .end = start_ + write.bytes.len }, .{ .write = write.bytes })) return;
        }
    }

    /// A group, or a segment's header, turns up a second time where it does not belong.
    fn repeatElsewhere(sim: *Simulation, copies: []const Copy) !void {
        const random = sim.prng.random();
        var name: []const u8 = undefined;
        var part: Bytes = .{ .start = 0, .end = wal.block_size };
        if (copies.len > 0 and random.uintLessThan(u8, 4) > 0) {
            const copy = copies[random.uintLessThan(usize, copies.len)];
            name = copy.name;
            part = copy.group;
        } else {
            name = try sim.anyFile() orelse return;
        }
        const contents = sim.disk.contents(path, name).?;
        if (part.end > contents.len) return;
        const bytes = try sim.arena.dupe(u8, contents[@intCast(part.start)..@intCast(part.end)]);
        try sim.misdirect(copies, .{ .inode = sim.disk.inodeOf(path, name), .offset = part.start, .bytes = bytes });
    }

    /// Some bytes of a header: of a segment, the checkpoint, a group or a record.
    fn strikeHeader(sim: *Simulation, copies: []const Copy) !void {
        const random = sim.prng.random();
        var header: Bytes = .{ .start = 0, .end = 96 };
        var name = try sim.anyFile() orelse return;
        if (std.mem.eql(u8, name, log_module.checkpoint_name)) {
            header = .{ .start = 0, .end = @sizeOf(wal.Checkpoint) };
            if (random.boolean()) header = .{ .start = wal.block_size, .end = wal.block_size + @sizeOf(wal.Checkpoint) };
        } else if (copies.len > 0 and random.uintLessThan(u8, 4) > 0) {
            const copy = copies[random.uintLessThan(usize, copies.len)];
            name = copy.name;
            header = if (random.boolean()) copy.group_header else .{ .start = copy.record.start, .end = copy.record.start + @sizeOf(wal.RecordHeader) };
        }
        var bytes: [4]u8 = undefined;
        random.bytes(&bytes);
        const length = 1 + random.uintLessThan(u64, bytes.len);
        const start_ = header.start + random.uintAtMost(u64, header.end - header.start - length);
        _ = try sim.strike(copies, name, .{ .start = start_, .end = start_ + length }, .{ .write = bytes[0..length] });
    }

    fn strikeAnything(sim: *Simulation, copies: []const Copy) !void {
        const random = sim.prng.random();
        var bytes: [8192]u8 = @splat(0);
        const length = 1 + random.uintLessThan(usize, if (random.boolean()) 200 else bytes.len);
        if (random.boolean()) random.bytes(&bytes);
        const how: Blow = if (random.uintLessThan(u8, 4) == 0) .unreadable else .{ .write = bytes[0..length] };
        for (0..tries_max) |_| {
            const name = try sim.anyFile() orelse return;
            const size: u64 = sim.disk.contents(path, name).?.len;
            if (length > size) continue;
            const start_ = random.uintAtMost(u64, size - length);
            if (try sim.strike(copies, name, .{ .start = start_, .end = start_ + length }, how)) return;
        }
    }

    /// A segment, or the checkpoint.
    fn anyFile(sim: *Simulation) !?[]const u8 {
        const names = try sim.disk.list(sim.arena, path, "");
        var count: usize = 0;
        for (names) |name| {
            if (!std.mem.endsWith(u8, name, ".wal") and !std.mem.eql(u8, name, log_module.checkpoint_name)) continue;
            names[count] = name;
            count += 1;
        }
        return if (count == 0) null else names[sim.prng.random().uintLessThan(usize, count)];
    }

    const Blow = union(enum) { write: []const u8, unreadable };

    /// false: not there, the log could not be asked to name it.
    fn strike(sim: *Simulation, copies: []const Copy, name: []const u8, wanted: Bytes, how: Blow) !bool {
        // A drive gives whole blocks or none.
        const hit = if (how == .unreadable)
            Bytes{ .start = wanted.start - wanted.start % wal.block_size, .end = std.mem.alignForward(u64, wanted.end, wal.block_size) }
        else
            wanted;
        const size: u64 = sim.disk.contents(path, name).?.len;
        if (size < 2 * wal.block_size or hit.end > size) return false;
        if (std.mem.endsWith(u8, name, ".wal")) {
            if (!sim.maySurvive(copies, name, size, hit)) return false;
            if (how == .write and !try sim.staysWhatItIs(name, hit, how.write)) return false;
        } else if (sim.acknowledged.getLastOrNull() == nobody_knows) return false;
        for (copies) |copy| {
            if (!std.mem.eql(u8, copy.name, name)) continue;
            if (hit.overlaps(copy.record) or hit.overlaps(copy.group_header)) sim.excuse(copy.lsn);
        }
        if (sim.settings.tells) sim.say("life {d}: hit {s} at {d} to {d}: {s}", .{ sim.lives, name, hit.start, hit.end, @tagName(how) });
        switch (how) {
            .write => |bytes| sim.disk.damage(path, name, hit.start, bytes),
            .unreadable => sim.disk.makeUnreadable(path, name, hit.start, hit.end - hit.start),
        }
        sim.counts.strikes += 1;
        return true;
    }

    fn hasCheckpoint(sim: *Simulation) bool {
        const contents = sim.disk.contents(path, log_module.checkpoint_name) orelse return false;
        for ([_]usize{ 0, wal.block_size }) |offset| {
            if (contents.len < offset + wal.block_size) break;
            if (sim.isUnreadable(log_module.checkpoint_name, offset)) continue;
            var block: wal.Checkpoint = undefined;
            @memcpy(std.mem.asBytes(&block), contents[offset..][0..@sizeOf(wal.Checkpoint)]);
            if (block.magic == wal.checkpoint_magic and block.header_checksum == block.computeChecksum()) return true;
        }
        return false;
    }

    fn isUnreadable(sim: *Simulation, name: []const u8, block_offset: u64) bool {
        for (sim.disk.unreadableOf(path, name)) |range| {
            if (range.start < block_offset + wal.block_size and range.end > block_offset) return true;
        }
        return false;
    }

    /// First or last block still says that it is a segment.
    fn hasAnEnd(sim: *Simulation, name: []const u8) bool {
        const contents = sim.disk.contents(path, name).?;
        if (contents.len < segment_bytes) return false;
        for ([_]u64{ 0, segment_bytes - wal.block_size }) |offset| {
            if (!sim.isUnreadable(name, offset) and reader_module.parseSegmentHeader(contents[@intCast(offset)..][0..wal.block_size]) == .valid) return true;
        }
        return false;
    }

    /// Whether the log can be asked to name what a hit there destroys.
    fn maySurvive(sim: *Simulation, copies: []const Copy, name: []const u8, size: u64, hit: Bytes) bool {
        for (copies) |copy| {
            if (copy.lsn == sim.acknowledged.items.len and std.mem.eql(u8, copy.name, name) and hit.overlaps(copy.group)) return false;
        }
        const first = Bytes{ .start = 0, .end = wal.block_size };
        const last = Bytes{ .start = size - size % wal.block_size -| wal.block_size, .end = size };
        if (!hit.overlaps(first) and !hit.overlaps(last)) return true;
        // The other end must be whole, and be able to speak for this one.
        if (hit.overlaps(first) and hit.overlaps(last)) return false;
        const contents = sim.disk.contents(path, name).?;
        const ends = [_]reader_module.ParsedHeader{
            reader_module.parseSegmentHeader(contents[0..wal.block_size]),
            reader_module.parseSegmentHeader(contents[@intCast(last.start)..][0..wal.block_size]),
        };
        for (ends) |end| if (end != .valid) return false;
        if (ends[0].valid.segment_id != ends[1].valid.segment_id) return false;
        for (sim.disk.unreadableOf(path, name)) |range| {
            if (first.overlaps(.{ .start = range.start, .end = range.end }) or last.overlaps(.{ .start = range.start, .end = range.end })) return false;
        }
        return true;
    }

    fn staysWhatItIs(sim: *Simulation, name: []const u8, hit: Bytes, bytes: []const u8) !bool {
        const before = sim.disk.contents(path, name).?;
        const after = try sim.arena.dupe(u8, before);
        @memcpy(after[@intCast(hit.start)..@intCast(hit.end)], bytes);
        const id = idOf(before) orelse return true;
        return idOf(after) == id;
    }

    /// Of the segment that a file is, by what recovery.zig promises to find out.
    fn idOf(contents: []const u8) ?u64 {
        const last_block = contents.len - contents.len % wal.block_size - wal.block_size;
        const first = reader_module.parseSegmentHeader(contents[0..wal.block_size]);
        const last = reader_module.parseSegmentHeader(contents[last_block..][0..wal.block_size]);
        if (first != .valid) return if (last == .valid) last.valid.segment_id else null;
        if (last != .valid or last.valid.segment_id == first.valid.segment_id) return first.valid.segment_id;
        const for_first = countGroups(contents, first.valid.segment_id);
        const for_last = countGroups(contents, last.valid.segment_id);
        return if (for_first > for_last) first.valid.segment_id else last.valid.segment_id;
    }

    fn countGroups(contents: []const u8, segment_id: u64) u32 {
        var count: u32 = 0;
        var offset: usize = wal.block_size;
        while (offset + wal.block_size <= contents.len) : (offset += wal.block_size) {
            count += @intFromBool(reader_module.parseGroupHeader(contents[offset..][0..wal.block_size], segment_id, offset) != null);
        }
        return count;
    }

    fn tellGroups(sim: *Simulation) !void {
        for (try sim.disk.list(sim.arena, path, ".wal")) |name| {
            const contents = sim.disk.contents(path, name).?;
            sim.say("  file {s}, {d} bytes", .{ name, contents.len });
            var offset: usize = 0;
            while (offset + wal.block_size <= contents.len) : (offset += wal.block_size) {
                const block = contents[offset..][0..wal.block_size];
                switch (reader_module.parseSegmentHeader(block)) {
                    .valid => |header| sim.say("    {d}: header of {x}, epoch {d}, first {d}, sealed {d}", .{ offset, header.segment_id, header.epoch, header.first_lsn, header.sealed_lsn }),
                    else => {},
                }
                const group: *align(1) const wal.GroupHeader = @ptrCast(block);
                if (group.magic != wal.group_magic) continue;
                sim.say("    {d}: group of {x}, block {d}, epoch {d}, segment first {d}, first {d}, {d} records, {d} bytes, {s}", .{ offset, group.segment_id, group.block, group.segment_epoch, group.segment_first_lsn, group.first_lsn, group.record_count, group.length_bytes, if (@as(*const wal.GroupHeader, @ptrCast(@alignCast(block))).computeChecksum() == group.header_checksum) "whole" else "damaged" });
            }
        }
    }

    /// Every place that holds an acknowledged record, by the format alone.
    fn findCopies(sim: *Simulation) ![]const Copy {
        var copies: std.ArrayListUnmanaged(Copy) = .empty;
        for (try sim.disk.list(sim.arena, path, ".wal")) |name| {
            const contents = sim.disk.contents(path, name).?;
            var offset: usize = wal.block_size;
            while (offset + wal.block_size <= contents.len) : (offset += wal.block_size) {
                var group: wal.GroupHeader = undefined;
                @memcpy(std.mem.asBytes(&group), contents[offset..][0..@sizeOf(wal.GroupHeader)]);
                if (group.magic != wal.group_magic or group.header_checksum != group.computeChecksum()) continue;
                const group_end = @min(offset + group.length_bytes, contents.len);
                var place: usize = offset + @sizeOf(wal.GroupHeader);
                while (place + @sizeOf(wal.RecordHeader) <= group_end) {
                    var record: wal.RecordHeader = undefined;
                    @memcpy(std.mem.asBytes(&record), contents[place..][0..@sizeOf(wal.RecordHeader)]);
                    if (record.magic != wal.record_magic or record.header_checksum != record.computeChecksum()) {
                        place += 8; // damaged before: the next one may start anywhere
                        continue;
                    }
                    if (record.lsn <= sim.acknowledged.items.len and sim.acknowledged.items[record.lsn - 1] == record.file_id) {
                        try copies.append(sim.arena, .{
                            .name = name,
                            .lsn = record.lsn,
                            .group = .{ .start = offset, .end = std.mem.alignForward(u64, offset + group.length_bytes, wal.block_size) },
                            .group_header = .{ .start = offset, .end = offset + @sizeOf(wal.GroupHeader) },
                            .record = .{ .start = place, .end = place + @sizeOf(wal.RecordHeader) + record.length_bytes },
                        });
                    }
                    place += wal.recordBytes(record.length_bytes);
                }
            }
        }
        return copies.items;
    }
};

const length_bytes_max = 9000;

fn lengthOf(tag: u64) u32 {
    const drawn = std.hash.int(tag);
    return @intCast(switch (drawn % 4) {
        0 => drawn / 4 % 16,
        1, 2 => drawn / 4 % 1500,
        else => drawn / 4 % length_bytes_max,
    });
}

/// What payloads are cut from: they are filled and compared all the time, and random numbers for each took a quarter of it.
const noise: [2048]u64 = noise: {
    @setEvalBranchQuota(1 << 16);
    var words: [2048]u64 = undefined;
    var prng = std.Random.SplitMix64.init(0);
    for (&words) |*word| word.* = prng.next();
    break :noise words;
};

/// Another piece for each tag; where two are the same, the tags are not.
fn fill(payload: []u8, tag: u64) void {
    const bytes = std.mem.sliceAsBytes(&noise);
    const from: usize = @intCast(std.hash.int(tag) % (bytes.len - length_bytes_max));
    @memcpy(payload, bytes[from..][0..payload.len]);
    const tag_bytes = std.mem.asBytes(&tag);
    for (0..@min(payload.len, tag_bytes.len)) |index| payload[index] ^= tag_bytes[index];
}
