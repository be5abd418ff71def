//! All file access of the log goes through this small interface, so that a simulated disk can stand in for the
//! real one. Every function may be called from any thread, on different files or on disjoint ranges of one.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const os = @import("../os.zig");

/// One name per errno, so that an error keeps its number on the way to whoever waits for it.
pub const Error = error{
    NotPermitted,
    NotFound,
    InputOutput,
    NoSuchDevice,
    OutOfKernelMemory,
    AccessDenied,
    Busy,
    AlreadyExists,
    NotADirectory,
    IsADirectory,
    InvalidArgument,
    SystemFileLimit,
    ProcessFileLimit,
    FileTooBig,
    NoSpace,
    ReadOnly,
    TooManyLinks,
    NameTooLong,
    TooManySymlinks,
    NotEmpty,
    BadMessage,
    NotSupported,
    TimedOut,
    Stale,
    NeedsCleaning,
    RemoteInputOutput,
    QuotaExceeded,
    NotConnected,
    /// An errno that no file call is known to give; counts as EIO.
    Unexpected,
};

const errno_table = [_]struct { linux.E, Error }{
    .{ .PERM, error.NotPermitted },
    .{ .NOENT, error.NotFound },
    .{ .IO, error.InputOutput },
    .{ .NXIO, error.NoSuchDevice },
    .{ .NOMEM, error.OutOfKernelMemory },
    .{ .ACCES, error.AccessDenied },
    .{ .BUSY, error.Busy },
    .{ .EXIST, error.AlreadyExists },
    .{ .NOTDIR, error.NotADirectory },
    .{ .ISDIR, error.IsADirectory },
    .{ .INVAL, error.InvalidArgument },
    .{ .NFILE, error.SystemFileLimit },
    .{ .MFILE, error.ProcessFileLimit },
    .{ .FBIG, error.FileTooBig },
    .{ .NOSPC, error.NoSpace },
    .{ .ROFS, error.ReadOnly },
    .{ .MLINK, error.TooManyLinks },
    .{ .NAMETOOLONG, error.NameTooLong },
    .{ .LOOP, error.TooManySymlinks },
    .{ .NOTEMPTY, error.NotEmpty },
    .{ .BADMSG, error.BadMessage },
    .{ .OPNOTSUPP, error.NotSupported },
    .{ .TIMEDOUT, error.TimedOut },
    .{ .STALE, error.Stale },
    .{ .UCLEAN, error.NeedsCleaning },
    .{ .REMOTEIO, error.RemoteInputOutput },
    .{ .DQUOT, error.QuotaExceeded },
    .{ .NOTCONN, error.NotConnected },
};

/// The errno that an error stands for: positive, never 0.
pub fn errnoOf(err: Error) i32 {
    for (errno_table) |row| {
        if (row[1] == err) return @intFromEnum(row[0]);
    }
    return @intFromEnum(linux.E.IO);
}

pub fn errorOf(errno: i32) Error {
    for (errno_table) |row| {
        if (@intFromEnum(row[0]) == errno) return row[1];
    }
    return error.Unexpected;
}

pub const Directory = enum(i32) { _ };
pub const File = enum(i32) { _ };

pub const EntryKind = enum { file, directory, other };

/// Gets each entry of a directory but "." and ".."; `name` is valid during the call only.
pub const ListVisitor = struct {
    context: *anyopaque,
    visit: *const fn (context: *anyopaque, name: []const u8, kind: EntryKind, size_bytes: u64) void,
};

/// Offset, length and memory of every transfer of a direct file must be multiples of this.
pub const alignment = 4096;
pub const vectors_max = 4;
pub const name_bytes_max = 255;

pub const Storage = struct {
    context: *anyopaque,
    vtable: *const VTable,

    pub const VTable = struct {
        openDirectory: *const fn (context: *anyopaque, parent: ?Directory, path: []const u8) Error!Directory,
        closeDirectory: *const fn (context: *anyopaque, directory: Directory) void,
        supportsDirect: *const fn (context: *anyopaque, directory: Directory) bool,
        list: *const fn (context: *anyopaque, directory: Directory, visitor: ListVisitor) Error!void,
        create: *const fn (context: *anyopaque, directory: Directory, name: []const u8, direct: bool) Error!File,
        open: *const fn (context: *anyopaque, directory: Directory, name: []const u8, direct: bool) Error!File,
        close: *const fn (context: *anyopaque, file: File) void,
        size: *const fn (context: *anyopaque, file: File) Error!u64,
        read: *const fn (context: *anyopaque, file: File, buffer: []u8, offset: u64) Error!usize,
        write: *const fn (context: *anyopaque, file: File, vectors: []const []const u8, offset: u64, durable: bool) Error!void,
        allocate: *const fn (context: *anyopaque, file: File, size_bytes: u64) Error!void,
        sync: *const fn (context: *anyopaque, file: File) Error!void,
        syncDirectory: *const fn (context: *anyopaque, directory: Directory) Error!void,
        unlink: *const fn (context: *anyopaque, directory: Directory, name: []const u8) Error!void,
        rename: *const fn (context: *anyopaque, from: Directory, from_name: []const u8, to: Directory, to_name: []const u8) Error!void,
        random: *const fn (context: *anyopaque, buffer: []u8) void,
        realtimeNs: *const fn (context: *anyopaque) u64,
    };

    /// Opens a directory, makes it (0700) and syncs its parent where it is missing. `path` is relative to `parent`,
    /// or absolute where that is null.
    pub fn openDirectory(storage: Storage, parent: ?Directory, path: []const u8) Error!Directory {
        return storage.vtable.openDirectory(storage.context, parent, path);
    }

    pub fn closeDirectory(storage: Storage, directory: Directory) void {
        storage.vtable.closeDirectory(storage.context, directory);
    }

    /// Whether files of this directory can be written around the page cache; found out by trying.
    pub fn supportsDirect(storage: Storage, directory: Directory) bool {
        return storage.vtable.supportsDirect(storage.context, directory);
    }

    pub fn list(storage: Storage, directory: Directory, visitor: ListVisitor) Error!void {
        return storage.vtable.list(storage.context, directory, visitor);
    }

    /// A new file (0600), open for reading and writing; AlreadyExists where the name is taken.
    pub fn create(storage: Storage, directory: Directory, name: []const u8, direct: bool) Error!File {
        return storage.vtable.create(storage.context, directory, name, direct);
    }

    /// An existing regular file, open for reading and writing. Follows no link, waits for no pipe.
    pub fn open(storage: Storage, directory: Directory, name: []const u8, direct: bool) Error!File {
        return storage.vtable.open(storage.context, directory, name, direct);
    }

    pub fn close(storage: Storage, file: File) void {
        storage.vtable.close(storage.context, file);
    }

    pub fn size(storage: Storage, file: File) Error!u64 {
        return storage.vtable.size(storage.context, file);
    }

    /// Bytes read: fewer than the buffer holds only at the end of the file.
    pub fn read(storage: Storage, file: File, buffer: []u8, offset: u64) Error!usize {
        return storage.vtable.read(storage.context, file, buffer, offset);
    }

    /// Writes all vectors, one behind the other, as one contiguous write. `durable`: they are on stable storage
    /// when it returns. After an error any part of it may be on the disk, now or later.
    pub fn write(storage: Storage, file: File, vectors: []const []const u8, offset: u64, durable: bool) Error!void {
        assert(vectors.len <= vectors_max);
        return storage.vtable.write(storage.context, file, vectors, offset, durable);
    }

    /// Reserves space for the whole file and sets its size, as posix_fallocate does. NotSupported where the file
    /// system cannot: then only writing reserves.
    pub fn allocate(storage: Storage, file: File, size_bytes: u64) Error!void {
        return storage.vtable.allocate(storage.context, file, size_bytes);
    }

    /// Data and size of the file are on stable storage when it returns.
    pub fn sync(storage: Storage, file: File) Error!void {
        return storage.vtable.sync(storage.context, file);
    }

    /// Names made, changed and removed in the directory are on stable storage when it returns.
    pub fn syncDirectory(storage: Storage, directory: Directory) Error!void {
        return storage.vtable.syncDirectory(storage.context, directory);
    }

    pub fn unlink(storage: Storage, directory: Directory, name: []const u8) Error!void {
        return storage.vtable.unlink(storage.context, directory, name);
    }

    /// AlreadyExists where the new name is taken.
    pub fn rename(storage: Storage, from: Directory, from_name: []const u8, to: Directory, to_name: []const u8) Error!void {
        return storage.vtable.rename(storage.context, from, from_name, to, to_name);
    }

    /// Fills the buffer with random bytes; never fails.
    pub fn random(storage: Storage, buffer: []u8) void {
        storage.vtable.random(storage.context, buffer);
    }

    pub fn randomU64(storage: Storage) u64 {
        var bytes: [8]u8 = undefined;
        storage.random(&bytes);
        return std.mem.readInt(u64, &bytes, .little);
    }

    /// Nanoseconds since 1970. For people: nothing depends on it.
    pub fn realtimeNs(storage: Storage) u64 {
        return storage.vtable.realtimeNs(storage.context);
    }
};

/// The real disk. Holds no descriptor of its own: those that it gave out are closed through it.
pub const LinuxStorage = struct {
    options: Options,
    /// Cleared once a kernel or file system has refused RWF_DSYNC: from then on write, then fdatasync.
    dsync_writes: std.atomic.Value(bool) = .init(true),

    pub const Options = struct {
        /// Commits leave out RWF_DSYNC and all syncs: a power cut loses what was acknowledged. For the tests
        /// that show that the power-cut tests see that, and for nothing else.
        no_sync: bool = false,
    };

    pub fn init(options: Options) LinuxStorage {
        return .{ .options = options };
    }

    /// The interface; `self` must stay where it is.
    pub fn storage(self: *LinuxStorage) Storage {
        return .{ .context = self, .vtable = &vtable };
    }

    pub const vtable = Storage.VTable{
        .openDirectory = openDirectory,
        .closeDirectory = closeDirectory,
        .supportsDirect = supportsDirect,
        .list = list,
        .create = create,
        .open = open,
        .close = close,
        .size = size,
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

    fn from(context: *anyopaque) *LinuxStorage {
        return @ptrCast(@alignCast(context));
    }

    /// The value of a system call, repeated as long as a signal interrupts it.
    inline fn call(function: anytype, arguments: anytype) Error!usize {
        while (true) {
            switch (os.check(@call(.auto, function, arguments))) {
                .value => |value| return value,
                .errno => |errno| if (errno != @intFromEnum(linux.E.INTR)) return errorOf(errno),
            }
        }
    }

    fn terminated(name: []const u8, buffer: *[linux.PATH_MAX]u8) Error![*:0]const u8 {
        if (name.len >= buffer.len) return error.NameTooLong;
        if (std.mem.indexOfScalar(u8, name, 0) != null) return error.InvalidArgument;
        @memcpy(buffer[0..name.len], name);
        buffer[name.len] = 0;
        return buffer[0..name.len :0];
    }

    const directory_flags = linux.O{ .ACCMODE = .RDONLY, .DIRECTORY = true, .CLOEXEC = true };

    fn openDirectory(context: *anyopaque, parent: ?Directory, path: []const u8) Error!Directory {
        const self = from(context);
        var buffer: [linux.PATH_MAX]u8 = undefined;
        const path_z = try terminated(path, &buffer);
        const parent_fd: i32 = if (parent) |directory| @intFromEnum(directory) else linux.AT.FDCWD;
        var made = false;
        const fd = call(linux.openat, .{ parent_fd, path_z, directory_flags, 0 }) catch |err| switch (err) {
            error.NotFound => fd: {
                made = true;
                _ = call(linux.mkdirat, .{ parent_fd, path_z, 0o700 }) catch |mkdir_err| switch (mkdir_err) {
                    error.AlreadyExists => {},
                    else => return mkdir_err,
                };
                break :fd try call(linux.openat, .{ parent_fd, path_z, directory_flags, 0 });
            },
            else => return err,
        };
        errdefer os.close(@intCast(fd));
        const directory: Directory = @enumFromInt(@as(i32, @intCast(fd)));
        if (self.options.no_sync) return directory;
        // Not only where it was just made: whoever made it may have been killed before the sync.
        const above = call(linux.openat, .{ @as(i32, @intCast(fd)), "..", directory_flags, 0 }) catch |err| {
            if (err == error.AccessDenied and !made) return directory;
            return err;
        };
        defer os.close(@intCast(above));
        _ = try call(linux.fsync, .{@as(i32, @intCast(above))});
        return directory;
    }

    fn closeDirectory(context: *anyopaque, directory: Directory) void {
        _ = context;
        os.close(@intFromEnum(directory));
    }

    /// Some file systems take O_DIRECT and then refuse the writes, so one block is really written and read.
    fn supportsDirect(context: *anyopaque, directory: Directory) bool {
        const self = from(context);
        var name_buffer: [64]u8 = undefined;
        const name = std.fmt.bufPrint(&name_buffer, ".probe-{x}", .{self.storage().randomU64()}) catch unreachable;
        const file = create(context, directory, name, true) catch return false;
        defer close(context, file);
        defer unlink(context, directory, name) catch {};
        var block: [alignment]u8 align(alignment) = @splat(0x5a);
        write(context, file, &.{&block}, 0, false) catch return false;
        const length = read(context, file, &block, 0) catch return false;
        return length == block.len;
    }

    fn list(context: *anyopaque, directory: Directory, visitor: ListVisitor) Error!void {
        _ = context;
        // A descriptor of its own: the position in a directory belongs to the open file.
        const fd: i32 = @intCast(try call(linux.openat, .{ @intFromEnum(directory), ".", directory_flags, 0 }));
        defer os.close(fd);
        var buffer: [16 * 1024]u8 align(8) = undefined;
        while (true) {
            const length = try call(linux.getdents64, .{ fd, &buffer, buffer.len });
            if (length == 0) return;
            var offset: usize = 0;
            while (offset < length) {
                const entry: *align(1) linux.dirent64 = @ptrCast(&buffer[offset]);
                offset += entry.reclen;
                const name_z: [*:0]const u8 = @ptrCast(&entry.name);
                const name = std.mem.span(name_z);
                if (std.mem.eql(u8, name, ".") or std.mem.eql(u8, name, "..")) continue;
                var stat: linux.Statx = undefined;
                const mask = linux.STATX_TYPE | linux.STATX_SIZE;
                _ = call(linux.statx, .{ @intFromEnum(directory), name_z, linux.AT.SYMLINK_NOFOLLOW, mask, &stat }) catch |err| switch (err) {
                    error.NotFound => continue,
                    else => return err,
                };
                const kind: EntryKind = switch (stat.mode & linux.S.IFMT) {
                    linux.S.IFREG => .file,
                    linux.S.IFDIR => .directory,
                    else => .other,
                };
                visitor.visit(visitor.context, name, kind, stat.size);
            }
        }
    }

    fn create(context: *anyopaque, directory: Directory, name: []const u8, direct: bool) Error!File {
        _ = context;
        var buffer: [linux.PATH_MAX]u8 = undefined;
        const name_z = try terminated(name, &buffer);
        const flags = linux.O{ .ACCMODE = .RDWR, .CREAT = true, .EXCL = true, .NOFOLLOW = true, .CLOEXEC = true, .DIRECT = direct };
        return @enumFromInt(@as(i32, @intCast(try call(linux.openat, .{ @intFromEnum(directory), name_z, flags, 0o600 }))));
    }

    fn open(context: *anyopaque, directory: Directory, name: []const u8, direct: bool) Error!File {
        _ = context;
        var buffer: [linux.PATH_MAX]u8 = undefined;
        const name_z = try terminated(name, &buffer);
        const flags = linux.O{ .ACCMODE = .RDWR, .NOFOLLOW = true, .NONBLOCK = true, .CLOEXEC = true, .DIRECT = direct };
        const fd: i32 = @intCast(try call(linux.openat, .{ @intFromEnum(directory), name_z, flags, 0 }));
        errdefer os.close(fd);
        switch (os.statOf(fd)) {
            .stat => |stat| if (!stat.isRegular()) return error.InvalidArgument,
            .errno => |errno| return errorOf(errno),
        }
        return @enumFromInt(fd);
    }

    fn close(context: *anyopaque, file: File) void {
        _ = context;
        os.close(@intFromEnum(file));
    }

    fn size(context: *anyopaque, file: File) Error!u64 {
        _ = context;
        return switch (os.statOf(@intFromEnum(file))) {
            .stat => |stat| stat.size,
            .errno => |errno| errorOf(errno),
        };
    }

    fn read(context: *anyopaque, file: File, buffer: []u8, offset: u64) Error!usize {
        _ = context;
        var done: usize = 0;
        while (done < buffer.len) {
            const position = std.math.cast(i64, offset + done) orelse return error.InvalidArgument;
            const count = try call(linux.pread, .{ @intFromEnum(file), buffer.ptr + done, buffer.len - done, position });
            if (count == 0) break;
            done += count;
            // A regular file's read stops short only at its end; a direct one could not go on from there.
            if ((offset + done) % alignment != 0) break;
        }
        return done;
    }

    fn write(context: *anyopaque, file: File, vectors: []const []const u8, offset: u64, durable: bool) Error!void {
        const self = from(context);
        const fd = @intFromEnum(file);
        var local: [vectors_max]std.posix.iovec_const = undefined;
        for (vectors, local[0..vectors.len]) |vector, *slot| slot.* = .{ .base = vector.ptr, .len = vector.len };
        var rest: []std.posix.iovec_const = local[0..vectors.len];
        var position = offset;
        const sync_wanted = durable and !self.options.no_sync;
        var sync_after = sync_wanted and !self.dsync_writes.load(.monotonic);
        while (rest.len > 0) {
            if (rest[0].len == 0) {
                rest = rest[1..];
                continue;
            }
            const flags: u32 = if (sync_wanted and !sync_after) linux.RWF.DSYNC else 0;
            const position_signed = std.math.cast(i64, position) orelse return error.FileTooBig;
            const count = call(linux.pwritev2, .{ fd, rest.ptr, rest.len, position_signed, flags }) catch |err| {
                if (err != error.NotSupported or flags == 0) return err;
                self.dsync_writes.store(false, .monotonic);
                sync_after = true;
                continue;
            };
            // A regular file that takes no byte and gives no error is broken.
            if (count == 0) return error.InputOutput;
            position += count;
            var taken = count;
            while (taken > 0) {
                const part = @min(taken, rest[0].len);
                rest[0].base += part;
                rest[0].len -= part;
                taken -= part;
                if (rest[0].len == 0) rest = rest[1..];
            }
        }
        if (sync_after) _ = try call(linux.fdatasync, .{fd});
    }

    fn allocate(context: *anyopaque, file: File, size_bytes: u64) Error!void {
        _ = context;
        const length = std.math.cast(i64, size_bytes) orelse return error.FileTooBig;
        _ = try call(linux.fallocate, .{ @intFromEnum(file), 0, 0, length });
    }

    fn sync(context: *anyopaque, file: File) Error!void {
        if (from(context).options.no_sync) return;
        _ = try call(linux.fdatasync, .{@intFromEnum(file)});
    }

    fn syncDirectory(context: *anyopaque, directory: Directory) Error!void {
        if (from(context).options.no_sync) return;
        _ = try call(linux.fsync, .{@intFromEnum(directory)});
    }

    fn unlink(context: *anyopaque, directory: Directory, name: []const u8) Error!void {
        _ = context;
        var buffer: [linux.PATH_MAX]u8 = undefined;
        _ = try call(linux.unlinkat, .{ @intFromEnum(directory), try terminated(name, &buffer), 0 });
    }

    fn rename(context: *anyopaque, from_directory: Directory, from_name: []const u8, to_directory: Directory, to_name: []const u8) Error!void {
        _ = context;
        var from_buffer: [linux.PATH_MAX]u8 = undefined;
        var to_buffer: [linux.PATH_MAX]u8 = undefined;
        const from_z = try terminated(from_name, &from_buffer);
        const to_z = try terminated(to_name, &to_buffer);
        const no_replace = 1;
        _ = try call(linux.renameat2, .{ @intFromEnum(from_directory), from_z, @intFromEnum(to_directory), to_z, no_replace });
    }

    fn random(context: *anyopaque, buffer: []u8) void {
        _ = context;
        os.randomBytes(buffer);
    }

    fn realtimeNs(context: *anyopaque) u64 {
        _ = context;
        return os.realtimeNs();
    }
};

test "every error keeps its errno" {
    for (errno_table) |row| {
        const errno: i32 = @intFromEnum(row[0]);
        try std.testing.expectEqual(row[1], errorOf(errno));
        try std.testing.expectEqual(errno, errnoOf(row[1]));
    }
    try std.testing.expectEqual(error.Unexpected, errorOf(9999));
    try std.testing.expectEqual(@as(i32, @intFromEnum(linux.E.IO)), errnoOf(error.Unexpected));
}

test "files of a real directory behave as the interface says" {
    var temporary = std.testing.tmpDir(.{});
    defer temporary.cleanup();
    const path = try temporary.dir.realpathAlloc(std.testing.allocator, ".");
    defer std.testing.allocator.free(path);
    var linux_storage = LinuxStorage.init(.{});
    const storage = linux_storage.storage();
    const above = try storage.openDirectory(null, path);
    defer storage.closeDirectory(above);
    const directory = try storage.openDirectory(above, "made");
    defer storage.closeDirectory(directory);

    for ([_]bool{ false, storage.supportsDirect(directory) }) |direct| {
        const file = try storage.create(directory, "file", direct);
        defer storage.close(file);
        try std.testing.expectError(error.AlreadyExists, storage.create(directory, "file", direct));
        try storage.allocate(file, 3 * alignment);
        try std.testing.expectEqual(@as(u64, 3 * alignment), try storage.size(file));
        var blocks: [3][alignment]u8 align(alignment) = .{ @splat('a'), @splat('b'), @splat('c') };
        try storage.write(file, &.{ &blocks[0], &blocks[1] }, alignment, true);
        try storage.sync(file);
        // Beyond the end of the file nothing is read, and that is no error.
        var back: [4][alignment]u8 align(alignment) = undefined;
        const length = try storage.read(file, std.mem.sliceAsBytes(&back), alignment);
        try std.testing.expectEqual(@as(usize, 2 * alignment), length);
        try std.testing.expectEqualSlices(u8, std.mem.sliceAsBytes(blocks[0..2]), std.mem.sliceAsBytes(back[0..2]));
        try std.testing.expectEqual(@as(usize, 0), try storage.read(file, std.mem.sliceAsBytes(&back), 1 << 30));

        const other = try storage.create(directory, "other", direct);
        storage.close(other);
        try std.testing.expectError(error.AlreadyExists, storage.rename(directory, "file", directory, "other"));
        try storage.rename(directory, "file", above, "moved");
        try storage.syncDirectory(directory);
        try std.testing.expectError(error.NotFound, storage.open(directory, "file", direct));
        const again = try storage.open(above, "moved", direct);
        storage.close(again);
        try storage.unlink(above, "moved");
        try storage.unlink(directory, "other");
        try std.testing.expectError(error.NotFound, storage.unlink(directory, "other"));
    }

    const unaligned = try storage.create(directory, "text", false);
    defer storage.close(unaligned);
    try storage.write(unaligned, &.{ "one", "", "two" }, 0, true);
    var text: [10]u8 = undefined;
    try std.testing.expectEqual(@as(usize, 6), try storage.read(unaligned, &text, 0));
    try std.testing.expectEqualStrings("onetwo", text[0..6]);

    const Listed = struct {
        files: u32 = 0,
        directories: u32 = 0,
        bytes: u64 = 0,
        fn visit(context: *anyopaque, _: []const u8, kind: EntryKind, size_bytes: u64) void {
            const listed: *@This() = @ptrCast(@alignCast(context));
            switch (kind) {
                .file => listed.files += 1,
                .directory => listed.directories += 1,
                .other => {},
            }
            if (kind == .file) listed.bytes += size_bytes;
        }
    };
    var listed = Listed{};
    const inner = try storage.openDirectory(directory, "inner");
    storage.closeDirectory(inner);
    for (0..2) |_| {
        listed = .{};
        try storage.list(directory, .{ .context = &listed, .visit = Listed.visit });
        try std.testing.expectEqual(Listed{ .files = 1, .directories = 1, .bytes = 6 }, listed);
    }
    try std.testing.expectError(error.NameTooLong, storage.create(directory, "n" ** 300, false));
    try std.testing.expectError(error.InvalidArgument, storage.create(directory, "with\x00zero", false));
}
