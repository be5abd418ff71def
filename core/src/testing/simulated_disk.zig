//! A disk that fails on demand, all from one seed. It keeps, beside what programs see, what would be there after the
//! power went: nothing that was not made durable by a durable write or a sync is promised, and at a crash each
//! 512-byte sector of each such write, each change of a size and each change of a name is kept or dropped by the
//! seed (or all of them, or none).
//!
//! It can cut the power at any operation (half done), fail an operation with EIO or ENOSPC (half done), damage what
//! is stored, and be asked to ignore durability, so that a test can show that it would notice. One thread only.

const std = @import("std");
const assert = std.debug.assert;
const storage_module = @import("../engine/wal/storage.zig");
const Storage = storage_module.Storage;
const Error = storage_module.Error;

pub const sector_bytes = 512;

const Write = struct {
    offset: u64,
    bytes: []u8,
    /// The file's size right after it.
    size: u64,
    /// The kernel gave up on these pages: programs still see them, no sync brings them to the disk any more.
    given_up: bool = false,
};

/// What a file is, whatever its names are.
const Inode = struct {
    /// As programs see it.
    current: std.ArrayListUnmanaged(u8) = .empty,
    /// As a power cut would leave it if nothing of `unsynced` were kept.
    durable: std.ArrayListUnmanaged(u8) = .empty,
    /// In order.
    unsynced: std.ArrayListUnmanaged(Write) = .empty,
    /// Reading anything of this gives EIO.
    unreadable: ?struct { start: u64, end: u64 } = null,
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

pub const SimulatedDisk = struct {
    arena_state: std.heap.ArenaAllocator,
    prng: std.Random.DefaultPrng,
    names: Names = .empty,
    durable_names: Names = .empty,
    name_changes: std.ArrayListUnmanaged(NameChange) = .empty,
    /// Paths; making one is durable at once, as the interface says.
    directories: std.ArrayListUnmanaged([]const u8) = .empty,
    open_files: std.ArrayListUnmanaged(?*Inode) = .empty,
    /// Writes, syncs and changes of names so far.
    operation_count: u64 = 0,
    /// The power goes during this operation.
    cut_at: ?u64 = null,
    /// Everything fails from the cut to the next `restart`.
    is_off: bool = false,
    /// Of 1000 operations that change something, how many fail with EIO, and with ENOSPC where space is taken.
    input_output_per_mille: u32 = 0,
    no_space_per_mille: u32 = 0,
    /// Until this many more operations have failed, the faults are for good (a broken disk, a read-only mount).
    failing_operations_left: u64 = 0,
    failing_with: enum { input_output, no_space, read_only } = .input_output,
    /// Durable writes are taken for plain ones: a test of the tests.
    ignore_durable_writes: bool = false,
    /// The same for one file alone, by its name.
    ignore_durable_writes_of: ?[]const u8 = null,
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
        disk.cut_at = null;
        disk.failing_operations_left = 0;
        if (crash == .process) return;
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

    fn keeps(disk: *SimulatedDisk, crash: Crash) bool {
        return switch (crash) {
            .process => unreachable,
            .power => disk.prng.random().boolean(),
            .power_keeps_nothing => false,
            .power_keeps_all => true,
        };
    }

    fn crashInode(disk: *SimulatedDisk, inode: *Inode, crash: Crash) void {
        for (inode.unsynced.items) |pending| {
            // Whole, not at all, or torn.
            const mode: enum { keep, drop, tear } = switch (crash) {
                .process => unreachable,
                .power => switch (disk.prng.random().uintLessThan(u8, 4)) {
                    0 => .keep,
                    1 => .drop,
                    else => .tear,
                },
                .power_keeps_nothing => .drop,
                .power_keeps_all => .keep,
            };
            if (mode == .drop or (pending.given_up and mode == .keep)) continue;
            if (mode == .keep or disk.prng.random().boolean()) disk.grow(&inode.durable, pending.size);
            var done: usize = 0;
            while (done < pending.bytes.len) {
                const count = @min(sector_bytes - (pending.offset + done) % sector_bytes, pending.bytes.len - done);
                if (mode == .keep or disk.prng.random().boolean()) disk.put(&inode.durable, pending.bytes[done..][0..count], pending.offset + done);
                done += count;
            }
        }
        inode.unsynced.clearRetainingCapacity();
        inode.current.clearRetainingCapacity();
        inode.current.appendSlice(disk.arena(), inode.durable.items) catch unreachable;
    }

    fn applyDurably(disk: *SimulatedDisk, pending: NameChange) void {
        if (pending.from) |gone| {
            const found = disk.durable_names.get(gone);
            // Where what it builds on was dropped, there is nothing to pending.
            if (found == null or found.? != pending.inode) return;
            _ = disk.durable_names.remove(gone);
        }
        if (pending.to) |here| disk.durable_names.put(disk.arena(), here, pending.inode) catch unreachable;
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

    /// These bytes of a file cannot be read any more.
    pub fn makeUnreadable(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8, offset: u64, length: u64) void {
        disk.inodeOf(directory_path, name).unreadable = .{ .start = offset, .end = offset + length };
    }

    fn inodeOf(disk: *SimulatedDisk, directory_path: []const u8, name: []const u8) *Inode {
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

    const Outcome = enum { done, cut, failed, no_space, read_only };

    /// Every operation that changes something comes through here.
    fn operation(disk: *SimulatedDisk, takes_space: bool) Outcome {
        if (disk.is_off) return .cut;
        disk.operation_count += 1;
        if (disk.cut_at) |at| if (disk.operation_count >= at) {
            disk.is_off = true;
            return .cut;
        };
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

    fn errorOf(outcome: Outcome) Error!void {
        return switch (outcome) {
            .done => {},
            .cut, .failed => error.InputOutput,
            .no_space => error.NoSpace,
            .read_only => error.ReadOnly,
        };
    }

    /// Refused before anything happened.
    fn isRefused(outcome: Outcome) bool {
        return outcome == .no_space or outcome == .read_only;
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
        .random = random,
        .realtimeNs = realtimeNs,
    };

    fn from(context: *anyopaque) *SimulatedDisk {
        return @ptrCast(@alignCast(context));
    }

    fn openDirectory(context: *anyopaque, parent: ?storage_module.Directory, path: []const u8) Error!storage_module.Directory {
        const disk = from(context);
        if (disk.is_off) return error.InputOutput;
        const full = if (parent) |directory|
            std.fmt.allocPrint(disk.arena(), "{s}/{s}", .{ disk.directories.items[@intCast(@intFromEnum(directory))], path }) catch unreachable
        else
            disk.arena().dupe(u8, path) catch unreachable;
        if (disk.directoryIndex(full)) |index| return @enumFromInt(index);
        disk.directories.append(disk.arena(), full) catch unreachable;
        return @enumFromInt(@as(i32, @intCast(disk.directories.items.len - 1)));
    }

    fn closeDirectory(_: *anyopaque, _: storage_module.Directory) void {}

    /// It behaves like a page cache.
    fn supportsDirect(_: *anyopaque, _: storage_module.Directory) bool {
        return false;
    }

    fn listNames(context: *anyopaque, directory: storage_module.Directory, visitor: storage_module.ListVisitor) Error!void {
        const disk = from(context);
        if (disk.is_off) return error.InputOutput;
        var iterator = disk.names.iterator();
        while (iterator.next()) |entry| {
            if (entry.key_ptr.directory != @intFromEnum(directory)) continue;
            visitor.visit(visitor.context, entry.key_ptr.name, .file, entry.value_ptr.*.current.items.len);
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

    fn create(context: *anyopaque, directory: storage_module.Directory, name: []const u8, direct: bool) Error!storage_module.File {
        _ = direct;
        const disk = from(context);
        const name_key = disk.key(directory, name);
        if (disk.names.contains(name_key)) return error.AlreadyExists;
        const outcome = disk.operation(true);
        if (outcome != .cut) try errorOf(outcome);
        const inode = disk.arena().create(Inode) catch unreachable;
        inode.* = .{};
        disk.change(null, name_key, inode);
        if (outcome == .cut) return error.InputOutput;
        return disk.addFile(inode);
    }

    fn open(context: *anyopaque, directory: storage_module.Directory, name: []const u8, direct: bool) Error!storage_module.File {
        _ = direct;
        const disk = from(context);
        if (disk.is_off) return error.InputOutput;
        const inode = disk.names.get(.{ .directory = @intFromEnum(directory), .name = name }) orelse return error.NotFound;
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
        if (disk.is_off) return error.InputOutput;
        const inode = disk.fileOf(file);
        const bytes = inode.current.items;
        if (offset >= bytes.len) return 0;
        const count = @min(buffer.len, bytes.len - @as(usize, @intCast(offset)));
        if (inode.unreadable) |range| if (offset < range.end and offset + count > range.start) return error.InputOutput;
        @memcpy(buffer[0..count], bytes[@intCast(offset)..][0..count]);
        return count;
    }

    fn isIgnored(disk: *SimulatedDisk, inode: *Inode) bool {
        if (disk.ignore_durable_writes) return true;
        const name = disk.ignore_durable_writes_of orelse return false;
        var iterator = disk.names.iterator();
        while (iterator.next()) |entry| {
            if (entry.value_ptr.* == inode) return std.mem.eql(u8, entry.key_ptr.name, name);
        }
        return false;
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
        if (isRefused(outcome)) return errorOf(outcome);
        if (outcome != .done) {
            // Some of it may have got somewhere.
            if (disk.prng.random().boolean()) disk.put(&inode.current, bytes, offset);
            inode.unsynced.append(disk.arena(), .{ .offset = offset, .bytes = bytes, .size = offset + length, .given_up = outcome == .failed }) catch unreachable;
            return error.InputOutput;
        }
        disk.put(&inode.current, bytes, offset);
        if (durable and !disk.isIgnored(inode)) {
            disk.put(&inode.durable, bytes, offset);
            // What was written there before can come no more.
            disk.supersede(&inode.unsynced, offset, length);
        } else {
            inode.unsynced.append(disk.arena(), .{ .offset = offset, .bytes = bytes, .size = offset + length }) catch unreachable;
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
        try errorOf(disk.operation(true));
        disk.grow(&inode.current, size_bytes);
        inode.unsynced.append(disk.arena(), .{ .offset = 0, .bytes = &.{}, .size = size_bytes }) catch unreachable;
    }

    fn sync(context: *anyopaque, file: storage_module.File) Error!void {
        const disk = from(context);
        const inode = disk.fileOf(file);
        const outcome = disk.operation(false);
        if (outcome != .done) {
            // The pages are clean now, says the kernel, and the next sync will find nothing to do.
            for (inode.unsynced.items) |*pending| pending.given_up = true;
            return error.InputOutput;
        }
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
        if (outcome != .cut) try errorOf(outcome);
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
        if (outcome != .cut) try errorOf(outcome);
        disk.change(from_key, to_key, inode);
        return errorOf(outcome);
    }

    fn random(context: *anyopaque, buffer: []u8) void {
        from(context).prng.random().bytes(buffer);
    }

    fn realtimeNs(context: *anyopaque) u64 {
        const disk = from(context);
        disk.time_ns += 1000;
        return disk.time_ns;
    }
};
