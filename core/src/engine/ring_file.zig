//! The ring's file: made once with all its memory reserved, opened again by every later daemon, locked by one.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const os = @import("os.zig");
const Failure = @import("failure.zig").Failure;

pub const RingFile = struct {
    view: ring.View,
    /// Held for the lock; never given away. A client's descriptor shares no lock with it.
    lock_fd: i32,
    /// What clients get: an open file of its own.
    client_fd: i32,
    /// An earlier daemon made it: there may be records in it.
    existed: bool,

    /// Opens or makes the ring at `path`. Every refusal is in `failure`.
    pub fn open(path: [:0]const u8, failure: *Failure) error{Failed}!RingFile {
        const flags = linux.O{ .ACCMODE = .RDWR, .CLOEXEC = true, .NOFOLLOW = true };
        var existed = true;
        const lock_fd = switch (os.descriptor(linux.open(path, flags, 0))) {
            .fd => |fd| fd,
            .errno => |errno| blk: {
                if (errno != @intFromEnum(linux.E.NOENT)) return failure.set(errno, "cannot open the ring {s}: {s}. Likely it belongs to another user or is a symbolic link; remove it or set ring.path", .{ path, Failure.nameOf(errno) });
                existed = false;
                break :blk try create(path, failure);
            },
        };
        errdefer os.close(lock_fd);
        switch (os.check(linux.flock(lock_fd, os.lock_exclusive))) {
            .value => {},
            .errno => |errno| return failure.set(if (errno == @intFromEnum(linux.E.AGAIN)) @intFromEnum(linux.E.BUSY) else errno, "another daemon serves the ring {s}. Stop that one first, or set another ring.path and control.socket for this one", .{path}),
        }
        const stat = switch (os.statOf(lock_fd)) {
            .stat => |stat| stat,
            .errno => |errno| return failure.set(errno, "cannot stat the ring {s}: {s}", .{ path, Failure.nameOf(errno) }),
        };
        const uid = linux.geteuid();
        if (!stat.isRegular() or stat.uid != uid) return failure.set(@intFromEnum(linux.E.PERM), "the ring {s} belongs to uid {d}, this daemon runs as {d}. Somebody else put it there; remove it or set ring.path", .{ path, stat.uid, uid });
        if (stat.size == 0 and existed) {
            // A daemon was killed between making and sizing it: nobody can have used it.
            existed = false;
        } else if (existed and stat.size != ring.file_size) {
            return failure.set(@intFromEnum(linux.E.PROTO), "the ring {s} has {d} bytes, version {d} has {d}: it is of another version or damaged. Stop its clients, let a daemon of its own version drain it (or remove it if it holds nothing you need)", .{ path, stat.size, ring.version, ring.file_size });
        }
        if (!existed) try reserve(lock_fd, path, failure);

        const memory = switch (os.check(linux.mmap(null, ring.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, lock_fd, 0))) {
            .value => |address| @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..ring.file_size],
            .errno => |errno| return failure.set(errno, "cannot map the ring {s}: {s}", .{ path, Failure.nameOf(errno) }),
        };
        errdefer _ = linux.munmap(memory.ptr, memory.len);
        const view = ring.View{ .memory = memory };
        const header = view.header();
        // version is written last: 0 means that whoever made it did not finish, and nobody can have used it.
        if (@atomicLoad(u32, &header.version, .acquire) == 0) {
            existed = false;
            format(view);
        }
        if (header.magic != ring.magic) return failure.set(@intFromEnum(linux.E.PROTO), "{s} is not a ring of Elgate. Remove it or set another ring.path", .{path});
        if (header.version != ring.version or header.slot_count != ring.slot_count or header.slot_size != ring.slot_size or header.producer_rows != ring.producer_rows)
            return failure.set(@intFromEnum(linux.E.PROTO), "the ring {s} is of version {d} ({d} slots of {d} bytes), this daemon serves version {d} ({d} of {d}). Let a daemon of its own version drain it, then remove it", .{ path, header.version, header.slot_count, header.slot_size, ring.version, ring.slot_count, ring.slot_size });

        const client_fd = switch (os.descriptor(linux.open(path, flags, 0))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot open the ring {s} for clients: {s}", .{ path, Failure.nameOf(errno) }),
        };
        return .{ .view = view, .lock_fd = lock_fd, .client_fd = client_fd, .existed = existed };
    }

    fn create(path: [:0]const u8, failure: *Failure) error{Failed}!i32 {
        const flags = linux.O{ .ACCMODE = .RDWR, .CREAT = true, .EXCL = true, .CLOEXEC = true, .NOFOLLOW = true };
        switch (os.descriptor(linux.open(path, flags, 0o660))) {
            .fd => |fd| {
                _ = linux.fchmod(fd, 0o660); // whatever the umask says
                return fd;
            },
            .errno => |errno| return failure.set(errno, "cannot create the ring {s}: {s}. Its directory must exist and be writable for this user", .{ path, Failure.nameOf(errno) }),
        }
    }

    /// All memory now: a full tmpfs is an error here, not a SIGBUS later.
    fn reserve(fd: i32, path: [:0]const u8, failure: *Failure) error{Failed}!void {
        switch (os.check(linux.fallocate(fd, 0, 0, @intCast(ring.file_size)))) {
            .value => {},
            .errno => |errno| {
                _ = linux.unlink(path);
                return failure.set(errno, "cannot reserve {d} bytes for the ring {s}: {s}. Free space there or enlarge that file system", .{ ring.file_size, path, Failure.nameOf(errno) });
            },
        }
    }

    fn format(view: ring.View) void {
        const header = view.header();
        @memset(view.memory[0..ring.slots_offset], 0);
        header.magic = ring.magic;
        header.slot_count = ring.slot_count;
        header.slot_size = ring.slot_size;
        header.producer_rows = ring.producer_rows;
        header.owner_uid = linux.geteuid();
        header.created_realtime_ns = os.realtimeNs();
        os.randomBytes(&header.uuid);
        for (0..ring.slot_count) |i| view.stateWord(i).* = ring.StateWord.free(0).bits();
        for (0..ring.producer_rows) |row| initMutex(view.producerRow(@intCast(row)));
        @atomicStore(u32, &header.version, ring.version, .release);
    }

    pub fn close(file: *RingFile) void {
        _ = linux.munmap(file.view.memory.ptr, file.view.memory.len);
        os.close(file.client_fd);
        os.close(file.lock_fd);
    }
};

const pthread_mutexattr_t = extern struct { bytes: [16]u8 align(8) };
extern "c" fn pthread_mutexattr_init(attribute: *pthread_mutexattr_t) c_int;
extern "c" fn pthread_mutexattr_setrobust(attribute: *pthread_mutexattr_t, robust: c_int) c_int;
extern "c" fn pthread_mutexattr_setpshared(attribute: *pthread_mutexattr_t, shared: c_int) c_int;
extern "c" fn pthread_mutex_init(mutex: *std.c.pthread_mutex_t, attribute: *const pthread_mutexattr_t) c_int;
const PTHREAD_MUTEX_ROBUST = 1;
const PTHREAD_PROCESS_SHARED = 1;

/// Makes a row's mutex new. Only where no living thread holds it.
pub fn initMutex(row: *ring.ProducerRow) void {
    comptime assert(@sizeOf(std.c.pthread_mutex_t) <= @sizeOf(@FieldType(ring.ProducerRow, "mutex")));
    var attribute: pthread_mutexattr_t = undefined;
    assert(pthread_mutexattr_init(&attribute) == 0);
    assert(pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST) == 0);
    assert(pthread_mutexattr_setpshared(&attribute, PTHREAD_PROCESS_SHARED) == 0);
    assert(pthread_mutex_init(@ptrCast(&row.mutex), &attribute) == 0);
    row.open_claim = 0;
    row.thread_id = 0;
}

pub const Owner = enum { living, gone };

/// Whether the thread that holds a row lives, by the word that the kernel itself marks when it dies.
pub fn ownerOf(row: *ring.ProducerRow) Owner {
    const word = @atomicLoad(u32, @as(*u32, @ptrCast(&row.mutex)), .acquire);
    if (word & ring.mutex_owner_died != 0) return .gone;
    return if (word & ring.mutex_thread_id_mask == 0) .gone else .living;
}
