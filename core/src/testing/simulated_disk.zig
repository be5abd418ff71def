//! A disk that fails on demand, all from one seed. One thread only.
//!
//! # What it does
//!
//! It keeps, beside what programs see, what would be there after the power went. Its faults, each of which can be
//! switched on by itself:
//!
//! - *Power cut* at any operation that changes something (write, sync, allocate, create, rename, unlink, sync of a
//!   directory, making of one). Nothing is promised but what a durable write, or a sync, was reported to have made
//!   durable. Of every other write each 512-byte sector is kept or dropped, or all are, or none; of names each change
//!   is kept or dropped, as long as what it builds on was kept. `shears`: a sector that was on its way may also hold
//!   garbage. `misdirects`: a write that was on its way may leave its own place as it was, and is handed to the test to
//!   be put somewhere else (`misdirected`).
//! - *Kill* of the process at any operation. What programs saw stays. The operation that was under way, and that of
//!   one more thread (`hangs_in`), are *late*: they land, whole, in part or not at all, before the next process is let
//!   in: that is what the log directory's lock is for. `lock_is_ignored`: they land while the next one runs.
//! - *Errors*: EIO, and ENOSPC where space is taken, from any operation; a failed write may have reached the disk in
//!   part. A failed sync marks what it covered as clean: programs see it, no later sync brings it to the disk. A failed
//!   write to a segment may also land later, as long as the process lives. Reads, opens and listings fail too, never
//!   more than twice in a row (a disk that does so more often is damaged).
//! - *Damage*: bytes that change, ranges that give EIO whenever they are read.
//!
//! # What it takes for granted
//!
//! A sector that nobody writes to stays as it is (unless damaged by the test). A write that was reported durable is
//! where it belongs. A rename happens or does not. A failed write to the checkpoint does not land after the next one.
//! Once a process is dead and its lock is free, nothing of it is on its way any more. A file system keeps its own
//! books: no write lands in another file than the log's.

const std = @import("std");
const assert = std.debug.assert;
const storage_module = @import("../engine/wal/storage.zig");
const Storage = storage_module.Storage;
const Error = storage_module.Error;

pub const sector_bytes = 512;

const Write = struct {
    offset: u64,
    bytes: []const u8,
    /// The file's size right after it.
    size: u64,
    /// The kernel gave up on these pages: programs still see them, no sync brings them to the disk any more.
    given_up: bool = false,
};

/// A write that lands although nobody waits for it any more.
const Late = struct {
    inode: *Inode,
    offset: u64,
    bytes: []const u8,
    lands_at: u64,
};

/// Where a write that went astray should have gone.
pub const Misdirected = struct { inode: *const Inode, offset: u64, bytes: []const u8 };

pub const Range = struct { start: u64, end: u64 };

/// What a file is, whatever its names are.
pub const Inode = struct {
    /// As programs see it.
    current: std.ArrayListUnmanaged(u8) = .empty,
    /// As a power cut would leave it if nothing of `unsynced` were kept.
    durable: std.ArrayListUnmanaged(u8) = .empty,
    /// In order.
    unsynced: std.ArrayListUnmanaged(Write) = .empty,
    /// Reading anything of these gives EIO.
    unreadable: std.ArrayListUnmanaged(Range) = .empty,
    is_segment: bool,
};

const NameKey = struct { directory: i32, name: []const u8 };

const NameContext = struct {
    pub fn hash(_: NameContext, key: NameKey) u64 {
        return std.hash.Wyhash.hash(@intCast(key.directory), key.name);
    }
    pub fn eql(_: NameContext, a: NameKey, b: NameKey) bool {
        return a.directory == b.directory and std.mem.eql(u8, a.name, b.name);
    }
};

const Names = std.HashMapUnmanaged(NameKey, *Inode, NameContext, 80);

/// A change of names that is not durable yet. Rename is one change: a journal keeps it whole.
const NameChange = struct {
    /// Gone from here, or null.
    from: ?NameKey,
    /// Now here, or null.
    to: ?NameKey,
    inode: *Inode,
};

const read_failures_in_a_row_max = 2;

pub const SimulatedDisk = struct {
    arena_state: std.heap.ArenaAllocator,
    prng: std.Random.DefaultPrng,
    names: Names = .empty,
    durable_names: Names = .empty,
    name_changes: std.ArrayListUnmanaged(NameChange) = .empty,
    /// Paths; making one is durable at once, as the interface says.
    directories: std.ArrayListUnmanaged([]const u8) = .empty,
    open_files: std.ArrayListUnmanaged(?*Inode) = .empty,
    /// Under way when the process was killed, or hung.
    under_way: std.ArrayListUnmanaged(Late) = .empty,
    /// Of failed writes, and where the lock is ignored of dead processes.
    late: std.ArrayListUnmanaged(Late) = .empty,
    /// Left their own place alone in the last power cut; for the test to put elsewhere.
    misdirected: std.ArrayListUnmanaged(Misdirected) = .empty,

    /// No page cache between: what programs see is what the disk has, and what a failed write left.
    direct: bool = false,
    /// Operations that change something, so far.
    operation_count: u64 = 0,
    /// The power goes, or the process is killed, during this operation.
    cut_at: ?u64 = null,
    /// Everything fails from the cut to the next `restart`.
    is_off: bool = false,
    /// A thread hangs in the operation that comes after so many more, and in all behind it until `threadGone`.
    hangs_in: ?u64 = null,
    is_hung: bool = false,
    /// Of 1000 operations that change something, how many fail with EIO, and with ENOSPC where space is taken.
    input_output_per_mille: u32 = 0,
    no_space_per_mille: u32 = 0,
    /// Of 1000 reads, opens and listings, how many fail with EIO.
    read_per_mille: u32 = 0,
    read_failures_in_a_row: u32 = 0,
    /// Until this many more operations have failed, the faults are for good (a broken disk, a read-only mount).
    failing_operations_left: u64 = 0,
    failing_with: enum { input_output, no_space, read_only } = .input_output,
    shears: bool = false,
    misdirects: bool = false,
    lock_is_ignored: bool = false,
    time_ns: u64 = 1_800_000_000_000_000_000,

    pub fn init(allocator: std.mem.Allocator, seed: u64) SimulatedDisk {
        return .{ .arena_state = .init(allocator), .prng = .init(seed) };
    }

    pub fn deinit(disk: *SimulatedDisk) void {
        disk.arena_state.deinit();
    }

    pub fn storage(disk: *SimulatedDisk) Storage {
        return .{ .context = disk, .vtable = &vtable };
    }

    fn arena(disk: *SimulatedDisk) std.mem.Allocator {
        return disk.arena_state.allocator();
    }

    pub const Crash = enum {
        /// The process is killed: what programs see stays.
        process,
        /// Power cut: each sector, size and name that is not durable is kept or dropped.
        power,
        /// Power cut, and nothing is kept.
        power_keeps_nothing,
        /// Power cut, and all is kept: whoever is lucky.
        power_keeps_all,
    };

    /// Ends every open file, and starts over with what is left. The cut, if one was set, is over.
    pub fn restart(disk: *SimulatedDisk, crash: Crash) void {
        disk.open_files.clearRetainingCapacity();
        disk.is_off = false;
        disk.is_hung = false;
        disk.hangs_in = null;
        disk.cut_at = null;
        disk.failing_operations_left = 0;
        disk.misdirected.clearRetainingCapacity();
        if (crash == .process) {
            // What failed may land until its process is gone, what was under way until the lock is free.
            disk.settle();
            for (disk.under_way.items) |late| {
                var delayed = late;
                delayed.lands_at = disk.operation_count + 1 + disk.prng.random().uintLessThan(u64, 80);
                if (disk.lock_is_ignored) disk.late.append(disk.arena(), delayed) catch unreachable else disk.land(late);
            }
            disk.under_way.clearRetainingCapacity();
            return;
        }
        disk.late.clearRetainingCapacity();
        for (disk.under_way.items) |late| disk.noteUnsynced(late.inode, .{ .offset = late.offset, .bytes = late.bytes, .size = late.offset + late.bytes.len });
        disk.under_way.clearRetainingCapacity();
        // Names first: a file without a name is gone.
        for (disk.name_changes.items) |pending| {
            if (disk.keeps(crash)) disk.applyDurably(pending);
        }
        disk.name_changes.clearRetainingCapacity();
        disk.names.deinit(disk.arena());
        disk.names = disk.durable_names.clone(disk.arena()) catch unreachable;
        var inodes = disk.names.valueIterator();
        while (inodes.next()) |inode| disk.crashInode(inode.*, crash);
    }

    /// Everything that was late has landed: the process that left it behind is gone.
    pub fn settle(disk: *SimulatedDisk) void {
        for (disk.late.items) |late| disk.land(late);
        disk.late.clearRetainingCapacity();
    }

    fn keeps(disk: *SimulatedDisk, crash: Crash) bool {
        return switch (crash) {
            .process => unreachable,
            .power => disk.prng.random().boolean(),
            .power_keeps_nothing => false,
            .power_keeps_all => true,
        };
    }

    fn crashInode(disk: *SimulatedDisk, inode: *Inode, crash: Crash) void {
        const random = disk.prng.random();
        for (inode.unsynced.items) |pending| {
            // Whole, not at all, torn, or somewhere else.
            const mode: enum { keep, drop, tear } = switch (crash) {
                .process => unreachable,
                .power => switch (random.uintLessThan(u8, 4)) {
                    0 => .keep,
                    1 => .drop,
                    else => .tear,
                },
                .power_keeps_nothing => .drop,
                .power_keeps_all => .keep,
            };
            if (mode == .drop or (pending.given_up and mode == .keep)) continue;
            if (mode == .keep or random.boolean()) disk.grow(&inode.durable, pending.size);
            if (disk.misdirects and crash == .power and pending.bytes.len >= sector_bytes and random.boolean()) {
                disk.misdirected.append(disk.arena(), .{ .inode = inode, .offset = pending.offset, .bytes = pending.bytes }) catch unreachable;
                continue;
            }
            disk.putSectors(&inode.durable, pending.bytes, pending.offset, mode == .keep);
        }
        inode.unsynced.clearRetainingCapacity();
        inode.current.clearRetainingCapacity();
        inode.current.appendSlice(disk.arena(), inode.durable.items) catch unreachable;
    }

    /// Each sector of a write or, unless `whole`, some, and some as garbage.
    fn putSectors(disk: *SimulatedDisk, target: *std.ArrayListUnmanaged(u8), bytes: []const u8, offset: u64, whole: bool) void {
        const random = disk.prng.random();
        var done: usize = 0;
        while (done < bytes.len) {
            const count = @min(sector_bytes - (offset + done) % sector_bytes, bytes.len - done);
            var garbage: [sector_bytes]u8 = undefined;
            if (whole or random.boolean()) {
                disk.put(target, bytes[done..][0..count], offset + done);
            } else if (disk.shears and random.boolean()) {
                random.bytes(&garbage);
                disk.put(target, garbage[0..count], offset + done);
            }
            done += count;
        }
    }

    fn applyDurably(disk: *SimulatedDisk, pending: NameChange) void {
        if (pending.from) |gone| {
            const found = disk.durable_names.get(gone);
            // Where what it builds on was dropped, there is nothing to change.
            if (found == null or found.? != pending.inode) return;
            _ = disk.durable_names.remove(gone);
        }
        if (pending.to) |here| disk.durable_names.put(disk.arena(), here, pending.inode) catch unreachable;
    }

    /// A write that nobody waits for reaches the disk, in whole, in part, or not at all; no flush follows it.
    fn land(disk: *SimulatedDisk, late: Late) void {
        const random = disk.prng.random();
        switch (random.uintLessThan(u8, 3)) {
            0 => {},
            1 => {
                disk.put(&late.inode.current, late.bytes, late.offset);
                disk.noteUnsynced(late.inode, .{ .offset = late.offset, .bytes = late.bytes, .size = late.offset + late.bytes.len });
            },
            else => disk.landPart(late.inode, late.offset, late.bytes),
        }
    }

    fn landPart(disk: *SimulatedDisk, inode: *Inode, offset: u64, bytes: []const u8) void {
        var done: usize = 0;
        while (done < bytes.len) {
            const count = @min(sector_bytes - (offset + done) % sector_bytes, bytes.len - done);
            if (disk.prng.random().boolean()) {
                const part = bytes[done..][0..count];
                disk.put(&inode.current, part, offset + done);
                disk.noteUnsynced(inode, .{ .offset = offset + done, .bytes = part, .size = offset + done + count });
            }
            done += count;
        }
    }

    /// An operation on files that are none of the log's, such as a sync of its targets. false: it failed.
    pub fn operationElsewhere(disk: *SimulatedDisk) bool {
        return disk.operation(false) == .done;
    }

    /// The thread that hung is out of sight (its process will be killed before it wakes): others go on.
    pub fn threadGone(disk: *SimulatedDisk) void {
        disk.is_hung = false;
        disk.hangs_in = null;
    }

    /// The contents of a file as they would be read now; null where there is none of that name.
    pub fn contents(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8) ?[]u8 {
        const directory = disk.directoryIndex(directory_path) orelse return null;
        const inode = disk.names.get(.{ .directory = directory, .name = name }) orelse return null;
        return inode.current.items;
    }

    /// Changes what is stored, for good: damage that no write did.
    pub fn damage(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8, offset: u64, bytes: []const u8) void {
        const inode = disk.inodeOf(directory_path, name);
        disk.put(&inode.current, bytes, offset);
        disk.put(&inode.durable, bytes, offset);
    }

    /// These bytes of a file cannot be read any more, until they are written again.
    pub fn makeUnreadable(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8, offset: u64, length: u64) void {
        const inode = disk.inodeOf(directory_path, name);
        var start = offset;
        while (start < offset + length) {
            // Sector by sector: each comes back when it is written.
            const end = @min(start - start % sector_bytes + sector_bytes, offset + length);
            inode.unreadable.append(disk.arena(), .{ .start = start, .end = end }) catch unreachable;
            start = end;
        }
    }

    pub fn isFile(disk: *const SimulatedDisk, directory_path: []const u8, name: []const u8, inode: *const Inode) bool {
        return disk.names.get(.{ .directory = disk.directoryIndex(directory_path).?, .name = name }) == inode;
    }

    pub fn unreadableOf(disk: *const SimulatedDisk, directory_path: []const u8, name: []const u8) []const Range {
        const inode = disk.names.get(.{ .directory = disk.directoryIndex(directory_path).?, .name = name }).?;
        return inode.unreadable.items;
    }

    pub fn inodeOf(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8) *Inode {
        return disk.names.get(.{ .directory = disk.directoryIndex(directory_path).?, .name = name }).?;
    }

    /// Names in a directory with this ending, in order; the caller's to free, names and list.
    pub fn list(disk: *SimulatedDisk, allocator: std.mem.Allocator, directory_path: []const u8, suffix: []const u8) ![][]const u8 {
        var found: std.ArrayListUnmanaged([]const u8) = .empty;
        const directory = disk.directoryIndex(directory_path) orelse return found.toOwnedSlice(allocator);
        var keys = disk.names.keyIterator();
        while (keys.next()) |known| {
            if (known.directory != directory or !std.mem.endsWith(u8, known.name, suffix)) continue;
            try found.append(allocator, try allocator.dupe(u8, known.name));
        }
        std.mem.sort([]const u8, found.items, {}, lessThan);
        return found.toOwnedSlice(allocator);
    }

    fn lessThan(_: void, a: []const u8, b: []const u8) bool {
        return std.mem.lessThan(u8, a, b);
    }

    fn directoryIndex(disk: *const SimulatedDisk, path: []const u8) ?i32 {
        for (disk.directories.items, 0..) |known, index| {
            if (std.mem.eql(u8, known, path)) return @intCast(index);
        }
        return null;
    }

    fn grow(disk: *SimulatedDisk, bytes: *std.ArrayListUnmanaged(u8), size: u64) void {
        if (size > bytes.items.len) bytes.appendNTimes(disk.arena(), 0, @intCast(size - bytes.items.len)) catch unreachable;
    }

    fn put(disk: *SimulatedDisk, target: *std.ArrayListUnmanaged(u8), bytes: []const u8, offset: u64) void {
        disk.grow(target, offset + bytes.len);
        @memcpy(target.items[@intCast(offset)..][0..bytes.len], bytes);
    }

    fn noteUnsynced(disk: *SimulatedDisk, inode: *Inode, pending: Write) void {
        inode.unsynced.append(disk.arena(), pending) catch unreachable;
    }

    const Outcome = enum {
        done,
        /// Under way when the process, or its thread, was last seen.
        cut,
        /// Nobody does anything any more.
        off,
        failed,
        no_space,
        read_only,
    };

    /// Every operation that changes something comes through here.
    fn operation(disk: *SimulatedDisk, takes_space: bool) Outcome {
        if (disk.is_off or disk.is_hung) return .off;
        disk.operation_count += 1;
        disk.landDue();
        if (disk.cut_at) |at| if (disk.operation_count >= at) {
            disk.is_off = true;
            return .cut;
        };
        if (disk.hangs_in) |*left| {
            if (left.* == 0) {
                disk.is_hung = true;
                return .cut;
            }
            left.* -= 1;
        }
        if (disk.failing_operations_left > 0) {
            disk.failing_operations_left -= 1;
            return switch (disk.failing_with) {
                .input_output => .failed,
                .no_space => .no_space,
                .read_only => .read_only,
            };
        }
        const drawn = disk.prng.random().uintLessThan(u32, 1000);
        if (drawn < disk.input_output_per_mille) return .failed;
        if (takes_space and drawn < disk.input_output_per_mille + disk.no_space_per_mille) return .no_space;
        return .done;
    }

    fn landDue(disk: *SimulatedDisk) void {
        var index: usize = 0;
        while (index < disk.late.items.len) {
            if (disk.late.items[index].lands_at > disk.operation_count) {
                index += 1;
                continue;
            }
            disk.land(disk.late.swapRemove(index));
        }
    }

    fn errorOf(outcome: Outcome) Error!void {
        return switch (outcome) {
            .done => {},
            .cut, .off, .failed => error.InputOutput,
            .no_space => error.NoSpace,
            .read_only => error.ReadOnly,
        };
    }

    /// Everything that only looks comes through here.
    fn look(disk: *SimulatedDisk) Error!void {
        if (disk.is_off or disk.is_hung) return error.InputOutput;
        if (disk.read_per_mille > 0 and disk.read_failures_in_a_row < read_failures_in_a_row_max and
            disk.prng.random().uintLessThan(u32, 1000) < disk.read_per_mille)
        {
            disk.read_failures_in_a_row += 1;
            return error.InputOutput;
        }
        disk.read_failures_in_a_row = 0;
    }

    const vtable = Storage.VTable{
        .openDirectory = openDirectory,
        .closeDirectory = closeDirectory,
        .supportsDirect = supportsDirect,
        .list = listNames,
        .create = create,
        .open = open,
        .close = close,
        .size = sizeOf,
        .read = read,
        .write = write,
        .allocate = allocate,
        .sync = sync,
        .syncDirectory = syncDirectory,
        .unlink = unlink,
        .rename = rename,
        .random = random_,
        .realtimeNs = realtimeNs,
    };

    fn from(context: *anyopaque) *SimulatedDisk {
        return @ptrCast(@alignCast(context));
    }

    fn openDirectory(context: *anyopaque, parent: ?storage_module.Directory, path: []const u8) Error!storage_module.Directory {
        const disk = from(context);
        if (disk.is_off or disk.is_hung) return error.InputOutput;
        const full = if (parent) |directory|
            std.fmt.allocPrint(disk.arena(), "{s}/{s}", .{ disk.directories.items[@intCast(@intFromEnum(directory))], path }) catch unreachable
        else
            disk.arena().dupe(u8, path) catch unreachable;
        if (disk.directoryIndex(full)) |index| return @enumFromInt(index);
        try errorOf(disk.operation(true));
        disk.directories.append(disk.arena(), full) catch unreachable;
        return @enumFromInt(@as(i32, @intCast(disk.directories.items.len - 1)));
    }

    fn closeDirectory(_: *anyopaque, _: storage_module.Directory) void {}

    fn supportsDirect(context: *anyopaque, _: storage_module.Directory) bool {
        return from(context).direct;
    }

    fn listNames(context: *anyopaque, directory: storage_module.Directory, visitor: storage_module.ListVisitor) Error!void {
        const disk = from(context);
        try disk.look();
        var iterator = disk.names.iterator();
        while (iterator.next()) |entry| {
            if (entry.key_ptr.directory != @intFromEnum(directory)) continue;
            visitor.visit(visitor.context, entry.key_ptr.name, .file, entry.value_ptr.*.current.items.len);
        }
        const above = disk.directories.items[@intCast(@intFromEnum(directory))];
        for (disk.directories.items) |full| {
            const name = std.fs.path.basenamePosix(full);
            if (full.len != above.len + 1 + name.len or !std.mem.startsWith(u8, full, above)) continue;
            visitor.visit(visitor.context, name, .directory, 0);
        }
    }

    fn key(disk: *SimulatedDisk, directory: storage_module.Directory, name: []const u8) NameKey {
        return .{ .directory = @intFromEnum(directory), .name = disk.arena().dupe(u8, name) catch unreachable };
    }

    fn addFile(disk: *SimulatedDisk, inode: *Inode) storage_module.File {
        disk.open_files.append(disk.arena(), inode) catch unreachable;
        return @enumFromInt(@as(i32, @intCast(disk.open_files.items.len - 1)));
    }

    fn fileOf(disk: *SimulatedDisk, file: storage_module.File) *Inode {
        return disk.open_files.items[@intCast(@intFromEnum(file))].?;
    }

    fn change(disk: *SimulatedDisk, from_key: ?NameKey, to: ?NameKey, inode: *Inode) void {
        if (from_key) |gone| _ = disk.names.remove(gone);
        if (to) |here| disk.names.put(disk.arena(), here, inode) catch unreachable;
        disk.name_changes.append(disk.arena(), .{ .from = from_key, .to = to, .inode = inode }) catch unreachable;
    }

    /// Whether a change of names happens: all of it, nothing, or by luck where it was under way.
    fn happens(disk: *SimulatedDisk, outcome: Outcome) Error!void {
        if (outcome == .cut and disk.prng.random().boolean()) return;
        return errorOf(outcome);
    }

    fn create(context: *anyopaque, directory: storage_module.Directory, name: []const u8, direct: bool) Error!storage_module.File {
        _ = direct;
        const disk = from(context);
        const name_key = disk.key(directory, name);
        if (disk.names.contains(name_key)) return error.AlreadyExists;
        const outcome = disk.operation(true);
        try disk.happens(outcome);
        const inode = disk.arena().create(Inode) catch unreachable;
        inode.* = .{ .is_segment = std.mem.endsWith(u8, name, ".wal") };
        disk.change(null, name_key, inode);
        try errorOf(outcome);
        return disk.addFile(inode);
    }

    fn open(context: *anyopaque, directory: storage_module.Directory, name: []const u8, direct: bool) Error!storage_module.File {
        _ = direct;
        const disk = from(context);
        const inode = disk.names.get(.{ .directory = @intFromEnum(directory), .name = name }) orelse return error.NotFound;
        try disk.look();
        return disk.addFile(inode);
    }

    fn close(context: *anyopaque, file: storage_module.File) void {
        const disk = from(context);
        const index: usize = @intCast(@intFromEnum(file));
        // After a restart descriptors of the life before are none of ours.
        if (index >= disk.open_files.items.len) return;
        disk.open_files.items[index] = null;
    }

    fn sizeOf(context: *anyopaque, file: storage_module.File) Error!u64 {
        return from(context).fileOf(file).current.items.len;
    }

    fn read(context: *anyopaque, file: storage_module.File, buffer: []u8, offset: u64) Error!usize {
        const disk = from(context);
        try disk.look();
        const inode = disk.fileOf(file);
        const bytes = inode.current.items;
        if (offset >= bytes.len) return 0;
        const count = @min(buffer.len, bytes.len - @as(usize, @intCast(offset)));
        for (inode.unreadable.items) |range| if (offset < range.end and offset + count > range.start) return error.InputOutput;
        @memcpy(buffer[0..count], bytes[@intCast(offset)..][0..count]);
        return count;
    }

    fn write(context: *anyopaque, file: storage_module.File, vectors: []const []const u8, offset: u64, durable: bool) Error!void {
        const disk = from(context);
        const inode = disk.fileOf(file);
        var length: usize = 0;
        for (vectors) |vector| length += vector.len;
        const bytes = disk.arena().alloc(u8, length) catch unreachable;
        var end: usize = 0;
        for (vectors) |vector| {
            @memcpy(bytes[end..][0..vector.len], vector);
            end += vector.len;
        }
        const outcome = disk.operation(offset + length > inode.current.items.len);
        switch (outcome) {
            .done => {},
            .off, .no_space, .read_only => return errorOf(outcome),
            .cut => {
                disk.under_way.append(disk.arena(), .{ .inode = inode, .offset = offset, .bytes = bytes, .lands_at = 0 }) catch unreachable;
                return error.InputOutput;
            },
            .failed => {
                disk.failWrite(inode, offset, bytes);
                return error.InputOutput;
            },
        }
        // The drive puts what it cannot keep there somewhere else.
        var index: usize = 0;
        while (index < inode.unreadable.items.len) {
            const range = inode.unreadable.items[index];
            if (offset < range.end and offset + length > range.start) _ = inode.unreadable.swapRemove(index) else index += 1;
        }
        disk.put(&inode.current, bytes, offset);
        if (durable) {
            disk.put(&inode.durable, bytes, offset);
            // What was written there before can come no more.
            disk.supersede(&inode.unsynced, offset, length);
        } else {
            disk.noteUnsynced(inode, .{ .offset = offset, .bytes = bytes, .size = offset + length });
        }
    }

    fn failWrite(disk: *SimulatedDisk, inode: *Inode, offset: u64, bytes: []const u8) void {
        const random = disk.prng.random();
        if (disk.direct) {
            disk.landPart(inode, offset, bytes);
        } else {
            // It is in the page cache or not, and on the disk in part.
            if (random.boolean()) disk.put(&inode.current, bytes, offset);
            disk.noteUnsynced(inode, .{ .offset = offset, .bytes = bytes, .size = offset + bytes.len, .given_up = true });
        }
        if (inode.is_segment) {
            disk.late.append(disk.arena(), .{ .inode = inode, .offset = offset, .bytes = bytes, .lands_at = disk.operation_count + 1 + random.uintLessThan(u64, 250) }) catch unreachable;
        }
    }

    /// Takes a range out of writes that are not durable.
    fn supersede(disk: *SimulatedDisk, writes: *std.ArrayListUnmanaged(Write), offset: u64, length: usize) void {
        const end = offset + length;
        var kept: std.ArrayListUnmanaged(Write) = .empty;
        for (writes.items) |old| {
            const old_end = old.offset + old.bytes.len;
            if (old_end <= offset or old.offset >= end) {
                kept.append(disk.arena(), old) catch unreachable;
                continue;
            }
            if (old.offset < offset) {
                var part = old;
                part.bytes = old.bytes[0..@intCast(offset - old.offset)];
                part.size = offset;
                kept.append(disk.arena(), part) catch unreachable;
            }
            if (old_end > end) {
                var part = old;
                part.bytes = old.bytes[@intCast(end - old.offset)..];
                part.offset = end;
                kept.append(disk.arena(), part) catch unreachable;
            }
        }
        writes.* = kept;
    }

    fn allocate(context: *anyopaque, file: storage_module.File, size_bytes: u64) Error!void {
        const disk = from(context);
        const inode = disk.fileOf(file);
        try errorOf(disk.operation(size_bytes > inode.current.items.len));
        disk.grow(&inode.current, size_bytes);
        disk.noteUnsynced(inode, .{ .offset = 0, .bytes = &.{}, .size = size_bytes });
    }

    fn sync(context: *anyopaque, file: storage_module.File) Error!void {
        const disk = from(context);
        const inode = disk.fileOf(file);
        const outcome = disk.operation(false);
        if (outcome == .failed) {
            // The pages are clean now, says the kernel, and the next sync will find nothing to do.
            for (inode.unsynced.items) |*pending| pending.given_up = true;
        }
        try errorOf(outcome);
        var kept: std.ArrayListUnmanaged(Write) = .empty;
        for (inode.unsynced.items) |pending| {
            if (pending.given_up) {
                kept.append(disk.arena(), pending) catch unreachable;
                continue;
            }
            disk.grow(&inode.durable, pending.size);
            disk.put(&inode.durable, pending.bytes, pending.offset);
            // A page that was given up and then written again is the new one.
            disk.supersede(&kept, pending.offset, pending.bytes.len);
        }
        inode.unsynced = kept;
    }

    fn syncDirectory(context: *anyopaque, directory: storage_module.Directory) Error!void {
        const disk = from(context);
        try errorOf(disk.operation(false));
        const index = @intFromEnum(directory);
        var kept: std.ArrayListUnmanaged(NameChange) = .empty;
        for (disk.name_changes.items) |pending| {
            const here = (pending.from != null and pending.from.?.directory == index) or (pending.to != null and pending.to.?.directory == index);
            if (here) disk.applyDurably(pending) else kept.append(disk.arena(), pending) catch unreachable;
        }
        disk.name_changes = kept;
    }

    fn unlink(context: *anyopaque, directory: storage_module.Directory, name: []const u8) Error!void {
        const disk = from(context);
        const name_key = disk.key(directory, name);
        const inode = disk.names.get(name_key) orelse return error.NotFound;
        const outcome = disk.operation(false);
        try disk.happens(outcome);
        disk.change(name_key, null, inode);
        return errorOf(outcome);
    }

    fn rename(context: *anyopaque, from_directory: storage_module.Directory, from_name: []const u8, to_directory: storage_module.Directory, to_name: []const u8) Error!void {
        const disk = from(context);
        const from_key = disk.key(from_directory, from_name);
        const to_key = disk.key(to_directory, to_name);
        const inode = disk.names.get(from_key) orelse return error.NotFound;
        if (disk.names.contains(to_key)) return error.AlreadyExists;
        const outcome = disk.operation(false);
        try disk.happens(outcome);
        disk.change(from_key, to_key, inode);
        return errorOf(outcome);
    }

    fn random_(context: *anyopaque, buffer: []u8) void {
        from(context).prng.random().bytes(buffer);
    }

    fn realtimeNs(context: *anyopaque) u64 {
        const disk = from(context);
        disk.time_ns += 1000;
        return disk.time_ns;
    }
};
