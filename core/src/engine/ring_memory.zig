//! A ring's memory: a file in /dev/shm, made once with all its memory reserved, opened again by every later daemon and
//! locked by one; or a sealed memfd, which only those have who were given it.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const ring = @import("../format/ring.zig");
const os = @import("os.zig");
const bus_guard = @import("bus_guard.zig");
const Failure = @import("failure.zig").Failure;

pub const RingMemory = struct {
    view: ring.View,
    /// Held for the lock; never given away. A client's descriptor shares no lock with it. -1: a memfd, which nobody
    /// else can open.
    lock_fd: i32,
    /// What clients get: an open file of its own.
    client_fd: i32,
    inode: Inode,
    /// Who may have it.
    uid: u32,
    /// Becomes true when somebody has cut the file short; null: its size is sealed.
    lost: ?*const bool,
    /// It stands in the place of one that somebody had cut short while no daemon was there.
    replaces_lost: bool = false,

    pub fn isLost(memory: *const RingMemory) bool {
        return if (memory.lost) |lost| @atomicLoad(bool, lost, .acquire) else false;
    }

    /// Asks the system: for what nobody has touched yet.
    pub fn isCutShort(memory: *const RingMemory) bool {
        if (memory.lost == null) return false;
        const size = os.sizeOf(memory.client_fd) orelse return false;
        return size < ring.file_size;
    }

    pub const Inode = struct { device: u64, number: u64 };

    pub fn inodeOf(fd: i32) ?Inode {
        return switch (os.statOf(fd)) {
            .stat => |stat| .{ .device = stat.device, .number = stat.inode },
            .errno => null,
        };
    }

    /// Opens or makes the ring at `path`. Every refusal is in `failure`.
    pub fn open(path: [:0]const u8, failure: *Failure) error{Failed}!RingMemory {
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
        if (existed and stat.size > 0 and stat.size < ring.file_size and isOfThisVersion(lock_fd)) {
            const memory = try replaceLost(path, failure);
            os.close(lock_fd);
            return memory;
        }
        if (stat.size == 0 and existed) {
            // A daemon was killed between making and sizing it: nobody can have used it.
            existed = false;
        } else if (existed and stat.size != ring.file_size) {
            return failure.set(@intFromEnum(linux.E.PROTO), "the ring {s} has {d} bytes, version {d} has {d}: it is of another version or damaged. Stop its clients, let a daemon of its own version drain it (or remove it if it holds nothing you need)", .{ path, stat.size, ring.version, ring.file_size });
        }
        if (!existed) try reserve(lock_fd, path, failure);
        const view = try map(lock_fd, failure);
        errdefer _ = linux.munmap(view.memory.ptr, view.memory.len);
        const header = view.header();
        // version is written last: 0 means that whoever made it did not finish, and nobody can have used it.
        if (@atomicLoad(u32, &header.version, .acquire) == 0) {
            format(view, uid);
        }
        if (header.magic != ring.magic) return failure.set(@intFromEnum(linux.E.PROTO), "{s} is not a ring of Elgate. Remove it or set another ring.path", .{path});
        if (header.version != ring.version or header.slot_count != ring.slot_count or header.slot_size != ring.slot_size or header.producer_rows != ring.producer_rows)
            return failure.set(@intFromEnum(linux.E.PROTO), "the ring {s} is of version {d} ({d} slots of {d} bytes), this daemon serves version {d} ({d} of {d}). Let a daemon of its own version drain it, then remove it", .{ path, header.version, header.slot_count, header.slot_size, ring.version, ring.slot_count, ring.slot_size });

        const client_fd = switch (os.descriptor(linux.open(path, flags, 0))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot open the ring {s} for clients: {s}", .{ path, Failure.nameOf(errno) }),
        };
        return .{ .view = view, .lock_fd = lock_fd, .client_fd = client_fd, .inode = .{ .device = stat.device, .number = stat.inode }, .uid = uid, .lost = bus_guard.watch(view.memory) };
    }

    /// What is left of a ring of ours that is too short. Clients of a daemon before may still look at it.
    fn isOfThisVersion(fd: i32) bool {
        var header: ring.Header = undefined;
        const bytes = std.mem.asBytes(&header);
        const length = os.check(linux.pread(fd, bytes.ptr, bytes.len, 0)).ok() orelse return false;
        return length == bytes.len and header.magic == ring.magic and header.version == ring.version;
    }

    /// The one that was cut short is kept beside the new one: only the last of them.
    fn replaceLost(path: [:0]const u8, failure: *Failure) error{Failed}!RingMemory {
        var buffer: [linux.PATH_MAX]u8 = undefined;
        const aside = std.fmt.bufPrintZ(&buffer, "{s}" ++ lost_suffix, .{path}) catch return failure.set(@intFromEnum(linux.E.NAMETOOLONG), "the ring's path is too long: {s}", .{path});
        const renamed = os.check(linux.rename(path, aside)).err();
        if (renamed != 0) return failure.set(renamed, "somebody has cut the ring {s} short, and it cannot be renamed to {s}: {s}", .{ path, aside, Failure.nameOf(renamed) });
        var memory = try open(path, failure);
        memory.replaces_lost = true;
        return memory;
    }

    pub const lost_suffix = ".lost";

    /// A new ring for clients of `uid`.
    pub fn make(uid: u32, failure: *Failure) error{Failed}!RingMemory {
        const fd = switch (os.descriptor(linux.memfd_create("elgate-ring", linux.MFD.CLOEXEC | linux.MFD.ALLOW_SEALING))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot make a ring (memfd_create): {s}", .{Failure.nameOf(errno)}),
        };
        errdefer os.close(fd);
        const reserved = os.check(linux.fallocate(fd, 0, 0, @intCast(ring.file_size))).err();
        if (reserved != 0) return failure.set(reserved, "cannot reserve {d} bytes for a ring: {s}. The host, or this daemon's memory limit, is short of memory", .{ ring.file_size, Failure.nameOf(reserved) });
        const seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
        const sealed = os.check(linux.fcntl(fd, F_ADD_SEALS, seals)).err();
        if (sealed != 0) return failure.set(sealed, "cannot seal a ring: {s}", .{Failure.nameOf(sealed)});
        const view = try map(fd, failure);
        format(view, uid);
        return .{ .view = view, .lock_fd = -1, .client_fd = fd, .inode = inodeOf(fd).?, .uid = uid, .lost = null };
    }

    /// A ring that a client hands back: a daemon before this one made it. Nothing in it is believed but what `Consumer`
    /// checks. Takes the descriptor over.
    pub fn adopt(fd: i32, uid: u32, failure: *Failure) error{Failed}!RingMemory {
        errdefer os.close(fd);
        const stat = switch (os.statOf(fd)) {
            .stat => |stat| stat,
            .errno => |errno| return failure.set(errno, "it cannot be looked at", .{}),
        };
        const needed = F_SEAL_SHRINK | F_SEAL_GROW;
        const seals = os.check(linux.fcntl(fd, F_GET_SEALS, 0)).ok() orelse 0;
        // A file of our own user's that was removed from /dev/shm is no more in danger of being cut short than the one
        // that is there now.
        const ours = uid == linux.geteuid() and stat.isRegular() and stat.uid == uid and stat.links == 0;
        if (seals & needed != needed and !ours) return failure.set(@intFromEnum(linux.E.PERM), "its size is not sealed", .{});
        if (stat.size != ring.file_size) return failure.set(@intFromEnum(linux.E.PROTO), "it has {d} bytes instead of {d}", .{ stat.size, ring.file_size });
        const view = try map(fd, failure);
        errdefer _ = linux.munmap(view.memory.ptr, view.memory.len);
        const header = view.header();
        if (header.magic != ring.magic or @atomicLoad(u32, &header.version, .acquire) != ring.version or header.slot_count != ring.slot_count or
            header.slot_size != ring.slot_size or header.producer_rows != ring.producer_rows)
            return failure.set(@intFromEnum(linux.E.PROTO), "it is no ring, or one of another version", .{});
        if (header.owner_uid != uid) return failure.set(@intFromEnum(linux.E.PERM), "it was made for uid {d}", .{header.owner_uid});
        const lost = if (seals & needed == needed) null else bus_guard.watch(view.memory);
        return .{ .view = view, .lock_fd = -1, .client_fd = fd, .inode = .{ .device = stat.device, .number = stat.inode }, .uid = uid, .lost = lost };
    }

    fn map(fd: i32, failure: *Failure) error{Failed}!ring.View {
        return switch (os.check(linux.mmap(null, ring.file_size, linux.PROT.READ | linux.PROT.WRITE, .{ .TYPE = .SHARED }, fd, 0))) {
            .value => |address| .{ .memory = @as([*]align(std.heap.page_size_min) u8, @ptrFromInt(address))[0..ring.file_size] },
            .errno => |errno| failure.set(errno, "cannot map a ring: {s}", .{Failure.nameOf(errno)}),
        };
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

    fn format(view: ring.View, uid: u32) void {
        const header = view.header();
        @memset(view.memory[0..ring.slots_offset], 0);
        header.magic = ring.magic;
        header.slot_count = ring.slot_count;
        header.slot_size = ring.slot_size;
        header.producer_rows = ring.producer_rows;
        header.owner_uid = uid;
        header.created_realtime_ns = os.realtimeNs();
        os.randomBytes(&header.uuid);
        for (0..ring.slot_count) |i| view.stateWord(i).* = ring.StateWord.free(0).bits();
        for (0..ring.producer_rows) |row| initMutex(view.producerRow(@intCast(row)));
        @atomicStore(u32, &header.version, ring.version, .release);
    }

    pub fn close(memory: *RingMemory) void {
        bus_guard.forget(memory.view.memory);
        _ = linux.munmap(memory.view.memory.ptr, memory.view.memory.len);
        os.close(memory.client_fd);
        if (memory.lock_fd >= 0) os.close(memory.lock_fd);
    }
};

const F_ADD_SEALS = 1033;
const F_GET_SEALS = 1034;
const F_SEAL_SEAL = 0x1;
const F_SEAL_SHRINK = 0x2;
const F_SEAL_GROW = 0x4;

const pthread_mutexattr_t = extern struct { bytes: [16]u8 align(8) };
extern "c" fn pthread_mutexattr_init(attribute: *pthread_mutexattr_t) c_int;
extern "c" fn pthread_mutexattr_setrobust(attribute: *pthread_mutexattr_t, robust: c_int) c_int;
extern "c" fn pthread_mutexattr_setpshared(attribute: *pthread_mutexattr_t, shared: c_int) c_int;
extern "c" fn pthread_mutex_init(mutex: *std.c.pthread_mutex_t, attribute: *const pthread_mutexattr_t) c_int;
const PTHREAD_MUTEX_ROBUST = 1;
const PTHREAD_PROCESS_SHARED = 1;

/// Makes a row's mutex new. Only where no living thread holds it.
pub fn initMutex(row: *ring.ProducerRow) void {
    initRobustMutex(&row.mutex);
    row.open_claim = 0;
    row.thread_id = 0;
}

/// In memory that processes share: the kernel marks it when the thread that holds it is gone.
pub fn initRobustMutex(mutex: *align(8) [64]u8) void {
    comptime assert(@sizeOf(std.c.pthread_mutex_t) <= 64);
    var attribute: pthread_mutexattr_t = undefined;
    assert(pthread_mutexattr_init(&attribute) == 0);
    assert(pthread_mutexattr_setrobust(&attribute, PTHREAD_MUTEX_ROBUST) == 0);
    assert(pthread_mutexattr_setpshared(&attribute, PTHREAD_PROCESS_SHARED) == 0);
    assert(pthread_mutex_init(@ptrCast(mutex), &attribute) == 0);
}

pub const Owner = enum { living, gone };

/// Whether the thread that holds a row lives, by the word that the kernel itself marks when it dies.
pub fn ownerOf(row: *ring.ProducerRow) Owner {
    const word = @atomicLoad(u32, @as(*u32, @ptrCast(&row.mutex)), .acquire);
    if (word & ring.mutex_owner_died != 0) return .gone;
    return if (word & ring.mutex_thread_id_mask == 0) .gone else .living;
}
