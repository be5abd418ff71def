//! The control socket: sessions, file handles, threads' rows. One thread; it never touches a byte of data.
//!
//! A session asks one thing at a time and waits for the answer; while the worker works on it nothing more is
//! read from that session.

const std = @import("std");
const assert = std.debug.assert;
const linux = std.os.linux;
const control = @import("../format/control.zig");
const ring = @import("../format/ring.zig");
const positions = @import("../format/positions.zig");
const routes = @import("../format/routes.zig");
const wal = @import("../format/wal.zig");
const os = @import("os.zig");
const files = @import("files.zig");
const File = files.File;
const State = @import("state.zig").State;
const Route = @import("route.zig").Route;
const Request = @import("requests.zig").Request;
const Failure = @import("failure.zig").Failure;
const steps = @import("steps.zig");
const names = @import("names.zig");
const marks = @import("marks.zig");
const served_ring = @import("served_ring.zig");
const ServedRing = served_ring.ServedRing;
const RingMemory = @import("ring_memory.zig").RingMemory;

pub const sessions_max = 4096;

const Credentials = extern struct { pid: i32, uid: u32, gid: u32 };

const Session = struct {
    id: u64,
    fd: i32,
    credentials: Credentials,
    /// Where its operations go; null before it is greeted.
    ring: ?*ServedRing = null,
    /// A request of its is with the worker.
    busy: bool = false,
    /// Of the file that it registers.
    former_file_id: u64 = 0,
    /// The socket is gone; freed when the worker has answered what is still with it.
    closed: bool = false,
    outstanding: u32 = 0,
    /// Parts of a change of names that are still to be logged; and why one of them was not.
    changes: u32 = 0,
    change_errno: i32 = 0,
    handles: std.ArrayListUnmanaged(OpenHandle) = .empty,
};

const OpenHandle = struct { index: u32, file: *File, releasing: bool = false };

const InodeKey = struct { device: u64, inode: u64 };

/// A file that is just being marked, or unmarked, and who waits to have it registered.
const Marking = struct {
    key: InodeKey,
    job: marks.Job,
    waiting: std.ArrayListUnmanaged(struct { session: *Session, sequence: u32, client_fd: i32 }) = .empty,
};

pub const Control = struct {
    state: *State,
    listen_fd: i32,
    epoll_fd: i32,
    /// Held while anything here is looked at or changed; free while the thread waits.
    mutex: std.Thread.Mutex = .{},
    sessions: std.AutoHashMapUnmanaged(i32, *Session) = .empty,
    sessions_by_id: std.AutoHashMapUnmanaged(u64, *Session) = .empty,
    next_session: u64 = 1,
    registry: std.AutoHashMapUnmanaged(InodeKey, *File) = .empty,
    /// Of these, the ones without handles, which are let go of soon.
    idle_files: u32 = 0,
    /// When the last client was asked to wait for that, for the event.
    short_at_ns: u64 = 0,
    marks: marks.Marks,
    marking: std.AutoHashMapUnmanaged(InodeKey, *Marking) = .empty,
    /// The one in /dev/shm, of the daemon's own user; null where it was lost and could not be made again.
    shared: ?*ServedRing,
    /// All that are served; the others are made for those who may not share that one.
    rings: [served_ring.rings_max]?*ServedRing = @splat(null),
    routes_generation: u32 = 0,
    marks_generation: u32 = 0,
    /// Sealed memfd with the table that clients get, and our own view of it.
    routes_fd: i32 = -1,
    table: routes.Table = undefined,
    table_memory: []align(8) u8 = &.{},
    /// Routes that may have entries there though they are gone from the configuration.
    retired_routes: std.StaticBitSet(positions.routes_max) = .initEmpty(),
    stopped: bool = false,
    spare_fd: i32,

    pub fn init(state: *State, shared: *ServedRing, listen_fd: i32, failure: *Failure) error{Failed}!Control {
        const epoll_fd = switch (os.descriptor(linux.epoll_create1(linux.EPOLL.CLOEXEC))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot make an epoll descriptor: {s}", .{Failure.nameOf(errno)}),
        };
        var self = Control{ .state = state, .shared = shared, .listen_fd = listen_fd, .epoll_fd = epoll_fd, .spare_fd = spareDescriptor(), .marks = .{ .allocator = state.allocator, .eventfd = state.control_eventfd } };
        self.rings[shared.index] = shared;
        self.watch(listen_fd, linux.EPOLL.CTL_ADD, linux.EPOLL.IN);
        self.watch(state.control_eventfd, linux.EPOLL.CTL_ADD, linux.EPOLL.IN);
        return self;
    }

    /// Files that replay found: known from the start, without handles.
    pub fn adopt(self: *Control, file: *File) void {
        self.registry.put(self.state.allocator, keyOf(file), file) catch return;
        self.idle_files += 1;
    }

    /// Thread body.
    pub fn run(self: *Control) void {
        var events: [64]linux.epoll_event = undefined;
        while (true) {
            const result = os.check(linux.epoll_wait(self.epoll_fd, &events, events.len, 1000));
            self.mutex.lock();
            defer self.mutex.unlock();
            if (self.stopped) {
                // The worker's last answers: files that it has let go of.
                self.takeAnswers();
                return self.awaitMarking();
            }
            const count = result.ok() orelse 0;
            for (events[0..count]) |event| {
                const fd = event.data.fd;
                if (fd == self.listen_fd) {
                    self.acceptAll();
                } else if (fd == self.state.control_eventfd) {
                    self.takeAnswers();
                } else if (self.sessions.get(fd)) |session| {
                    self.serve(session, event.events);
                }
            }
        }
    }

    /// Any thread: ends `run`, closes every session.
    pub fn stop(self: *Control) void {
        self.mutex.lock();
        self.stopped = true;
        self.mutex.unlock();
        const one: u64 = 1;
        _ = linux.write(self.state.control_eventfd, std.mem.asBytes(&one), 8);
    }

    /// The marks that are being taken off, if their file systems do not hang.
    fn awaitMarking(self: *Control) void {
        while (self.marking.count() > 0) {
            const now = os.monotonicNs();
            const deadline = @atomicLoad(u64, &self.state.stop_deadline_ns, .acquire);
            if (now >= deadline) return;
            var polled = [1]linux.pollfd{.{ .fd = self.state.control_eventfd, .events = linux.POLL.IN, .revents = 0 }};
            _ = linux.poll(&polled, 1, @intCast(@min((deadline - now) / std.time.ns_per_ms + 1, 1000)));
            self.takeAnswers();
        }
    }

    /// After `run` has ended: something hangs in a file system still.
    pub fn isStuck(self: *const Control) bool {
        return self.marking.count() > 0;
    }

    /// After `run` has ended, unless it is stuck.
    pub fn deinit(self: *Control) void {
        const allocator = self.state.allocator;
        assert(!self.isStuck());
        self.marks.deinit();
        self.marking.deinit(allocator);
        var sessions = self.sessions_by_id.valueIterator();
        while (sessions.next()) |entry| {
            const session = entry.*;
            if (!session.closed) os.close(session.fd);
            session.handles.deinit(allocator);
            allocator.destroy(session);
        }
        self.sessions.deinit(allocator);
        self.sessions_by_id.deinit(allocator);
        var known = self.registry.valueIterator();
        while (known.next()) |file| {
            // There is no log any more that could hold something for it.
            if (self.state.stub != null) files.unmark(file.*.fd);
            destroyFile(self.state, file.*);
        }
        self.registry.deinit(allocator);
        for (self.rings) |each| if (each) |served| served.destroy(allocator);
        if (self.routes_fd >= 0) os.close(self.routes_fd);
        allocator.free(self.table_memory);
        if (self.spare_fd >= 0) os.close(self.spare_fd);
        os.close(self.epoll_fd);
        os.close(self.listen_fd);
    }

    fn watch(self: *Control, fd: i32, operation: u32, interest: u32) void {
        var event = linux.epoll_event{ .events = interest, .data = .{ .fd = fd } };
        _ = linux.epoll_ctl(self.epoll_fd, operation, fd, &event);
    }

    // ---- sessions -----------------------------------------------------------------------------------

    fn acceptAll(self: *Control) void {
        while (true) {
            const fd = switch (os.descriptor(linux.accept4(self.listen_fd, null, null, linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK))) {
                .fd => |fd| fd,
                .errno => |errno| {
                    if (!isLimit(errno) or !self.turnAway()) return;
                    continue;
                },
            };
            self.open(fd) catch os.close(fd);
        }
    }

    /// Without a free number a connection can be neither accepted nor refused, and would wake this thread without end:
    /// the spare one serves to hang up. False: not even that.
    fn turnAway(self: *Control) bool {
        self.state.events.post(.warning, "descriptors_exhausted", .{ .hint = out_of_descriptors });
        if (self.spare_fd < 0) return false;
        os.close(self.spare_fd);
        const accepted = os.descriptor(linux.accept4(self.listen_fd, null, null, linux.SOCK.CLOEXEC | linux.SOCK.NONBLOCK));
        if (accepted == .fd) os.close(accepted.fd);
        self.spare_fd = spareDescriptor();
        return accepted == .fd;
    }

    fn spareDescriptor() i32 {
        return switch (os.descriptor(linux.eventfd(0, linux.EFD.CLOEXEC))) {
            .fd => |fd| fd,
            .errno => -1,
        };
    }

    fn open(self: *Control, fd: i32) !void {
        const allocator = self.state.allocator;
        if (self.sessions.count() >= sessions_max) return error.TooMany;
        var credentials: Credentials = undefined;
        var length: linux.socklen_t = @sizeOf(Credentials);
        if (os.check(linux.getsockopt(fd, linux.SOL.SOCKET, linux.SO.PEERCRED, std.mem.asBytes(&credentials), &length)) == .errno) return error.NoCredentials;
        const session = try allocator.create(Session);
        errdefer allocator.destroy(session);
        session.* = .{ .id = self.next_session, .fd = fd, .credentials = credentials };
        try self.sessions.put(allocator, fd, session);
        errdefer _ = self.sessions.remove(fd);
        try self.sessions_by_id.put(allocator, session.id, session);
        self.next_session += 1;
        self.watch(fd, linux.EPOLL.CTL_ADD, linux.EPOLL.IN | linux.EPOLL.RDHUP);
        self.state.counters.add(.sessions_opened_total, 1);
        self.state.counters.add(.sessions_open, 1);
    }

    fn close(self: *Control, session: *Session) void {
        if (session.closed) return;
        session.closed = true;
        _ = self.sessions.remove(session.fd);
        os.close(session.fd);
        self.state.counters.subtract(.sessions_open, 1);
        const its = session.ring orelse return;
        self.state.events.post(.info, "session_closed", .{ .session = session.id, .pid = session.credentials.pid });
        // Threads that outlive their session must not commit under handles that are about to go: what they
        // claimed before they could see this stands below the head that the worker reads next.
        for (&its.row_sessions, 0..) |*owner, row| {
            if (@atomicLoad(u64, owner, .acquire) != session.id) continue;
            @atomicStore(u64, &its.view.producerRow(@intCast(row)).session, 0, .seq_cst);
        }
        for (session.handles.items) |handle| {
            if (handle.releasing) continue; // asked for before its owner went away
            self.ask(session, .{ .kind = .release, .session = session.id, .ring = its, .file = handle.file, .handle = handle.index }) catch continue;
        }
        self.keepNames(session);
        if (self.state.ring_per_client and !self.isInUse(its)) {
            // Its client's next session gets another one, once this one is given up.
            its.leaving = true;
            @atomicStore(bool, &its.deserted, true, .release);
        }
        self.ask(session, .{ .kind = .forget_session, .session = session.id, .ring = its }) catch {};
    }

    fn isInUse(self: *Control, its: *const ServedRing) bool {
        if (its == self.shared) return true;
        var all = self.sessions_by_id.valueIterator();
        while (all.next()) |session| if (session.*.ring == its and !session.*.closed) return true;
        return false;
    }

    /// Everything of a closed session has been answered.
    fn retire(self: *Control, session: *Session) void {
        assert(session.closed and session.outstanding == 0);
        if (session.ring) |its| self.leaveRing(its);
        _ = self.sessions_by_id.remove(session.id);
        session.handles.deinit(self.state.allocator);
        self.state.allocator.destroy(session);
    }

    fn ask(self: *Control, session: *Session, request: Request) !void {
        const made = try self.state.allocator.create(Request);
        made.* = request;
        session.outstanding += 1;
        self.state.postToWorker(made);
    }

    // ---- messages -----------------------------------------------------------------------------------

    const Message = struct {
        bytes: [control.message_bytes_max]u8 align(8),
        length: usize,
        descriptors: [control.descriptors_max]i32,
        descriptor_count: usize,

        fn as(message: *const Message, comptime T: type) ?*const T {
            if (message.length != @sizeOf(T)) return null;
            return @ptrCast(&message.bytes);
        }

        /// The first descriptor, if there is one; the caller's to close.
        fn takeDescriptor(message: *Message) ?i32 {
            if (message.descriptor_count == 0) return null;
            const fd = message.descriptors[0];
            message.descriptor_count -= 1;
            std.mem.copyForwards(i32, message.descriptors[0..message.descriptor_count], message.descriptors[1 .. message.descriptor_count + 1]);
            return fd;
        }

        fn closeDescriptors(message: *Message) void {
            for (message.descriptors[0..message.descriptor_count]) |fd| os.close(fd);
            message.descriptor_count = 0;
        }
    };

    const ReceiveError = error{ WouldBlock, Closed, Malformed, OutOfDescriptors };

    fn receive(fd: i32, message: *Message) ReceiveError!void {
        var iov = [1]std.posix.iovec{.{ .base = &message.bytes, .len = message.bytes.len }};
        var ancillary: [256]u8 align(8) = undefined;
        var header = linux.msghdr{
            .name = null,
            .namelen = 0,
            .iov = &iov,
            .iovlen = 1,
            .control = &ancillary,
            .controllen = ancillary.len,
            .flags = 0,
        };
        message.descriptor_count = 0;
        const length = switch (os.check(linux.recvmsg(fd, &header, linux.MSG.DONTWAIT | linux.MSG.CMSG_CLOEXEC))) {
            .value => |value| value,
            .errno => |errno| return if (errno == @intFromEnum(linux.E.AGAIN) or errno == @intFromEnum(linux.E.INTR)) error.WouldBlock else error.Closed,
        };
        var surplus = false;
        var offset: usize = 0;
        while (offset + @sizeOf(AncillaryHeader) <= header.controllen) {
            const part: *const AncillaryHeader = @ptrCast(@alignCast(&ancillary[offset]));
            if (part.length < @sizeOf(AncillaryHeader) or part.length > header.controllen - offset) break;
            if (part.level == linux.SOL.SOCKET and part.kind == scm_rights) {
                var at = offset + @sizeOf(AncillaryHeader);
                while (at + 4 <= offset + part.length) : (at += 4) {
                    const received = std.mem.readInt(i32, ancillary[at..][0..4], .little);
                    if (message.descriptor_count < message.descriptors.len) {
                        message.descriptors[message.descriptor_count] = received;
                        message.descriptor_count += 1;
                    } else {
                        os.close(received);
                        surplus = true;
                    }
                }
            }
            offset += std.mem.alignForward(usize, part.length, 8);
        }
        message.length = length;
        if (length == 0 and message.descriptor_count == 0) return error.Closed;
        if (surplus or header.flags & linux.MSG.TRUNC != 0) return error.Malformed;
        if (length < @sizeOf(control.MessageHeader)) return error.Malformed;
        const head: *const control.MessageHeader = @ptrCast(&message.bytes);
        if (head.magic != control.magic or head.length_bytes != length) return error.Malformed;
        if (header.flags & linux.MSG.CTRUNC == 0) return;
        // There is room for more than any message carries: what did not arrive found no number free.
        return if (message.descriptor_count <= control.descriptors_max and offset < ancillary.len / 2) error.OutOfDescriptors else error.Malformed;
    }

    const AncillaryHeader = extern struct { length: usize, level: i32, kind: i32 };
    const scm_rights = 1;

    fn reply(self: *Control, session: *Session, comptime kind: control.Kind, sequence: u32, answer: anytype, descriptors: []const i32) void {
        var message = answer;
        message.header = .{
            .magic = control.magic,
            .version = control.version,
            .kind = @intFromEnum(kind),
            .length_bytes = @sizeOf(@TypeOf(answer)),
            .sequence = sequence,
        };
        var iov = [1]std.posix.iovec_const{.{ .base = std.mem.asBytes(&message), .len = @sizeOf(@TypeOf(answer)) }};
        var ancillary: [64]u8 align(8) = @splat(0);
        const part_length = @sizeOf(AncillaryHeader) + descriptors.len * 4;
        if (descriptors.len > 0) {
            const part: *AncillaryHeader = @ptrCast(&ancillary);
            part.* = .{ .length = part_length, .level = linux.SOL.SOCKET, .kind = scm_rights };
            for (descriptors, 0..) |fd, i| std.mem.writeInt(i32, ancillary[@sizeOf(AncillaryHeader) + i * 4 ..][0..4], fd, .little);
        }
        const header = linux.msghdr_const{
            .name = null,
            .namelen = 0,
            .iov = &iov,
            .iovlen = 1,
            .control = if (descriptors.len > 0) &ancillary else null,
            .controllen = if (descriptors.len > 0) std.mem.alignForward(usize, part_length, 8) else 0,
            .flags = 0,
        };
        // One answer to one question always fits; a client that does not read its answers loses its session.
        const sent = os.check(linux.sendmsg(session.fd, &header, linux.MSG.DONTWAIT | linux.MSG.NOSIGNAL));
        if (sent == .errno) self.close(session);
    }

    fn refuse(self: *Control, session: *Session, sequence: u32, refusal: control.Refusal, errno: i32) void {
        self.reply(session, .refused, sequence, control.Refused{ .header = undefined, .refusal = refusal, .errno = errno }, &.{});
    }

    fn serve(self: *Control, session: *Session, events: u32) void {
        if (events & linux.EPOLL.IN != 0 and !session.busy) {
            var message: Message = undefined;
            receive(session.fd, &message) catch |err| switch (err) {
                error.WouldBlock => return,
                error.Closed => return self.finish(session),
                error.OutOfDescriptors => {
                    message.closeDescriptors();
                    const head: *const control.MessageHeader = @ptrCast(&message.bytes);
                    if (self.hasSoonMore(session)) return self.refuse(session, head.sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
                    self.state.counters.add(.files_refused_total, 1);
                    self.state.events.post(.warning, "descriptors_exhausted", .{ .session = session.id, .pid = session.credentials.pid, .hint = out_of_descriptors });
                    return self.refuse(session, head.sequence, .limit_reached, @intFromEnum(linux.E.MFILE));
                },
                error.Malformed => {
                    message.closeDescriptors();
                    self.state.counters.add(.messages_bad_total, 1);
                    self.state.events.post(.warning, "control_message_bad", .{ .session = session.id, .pid = session.credentials.pid, .uid = session.credentials.uid, .length_bytes = message.length, .reason = "its magic, its length or its descriptors are not those of a message" });
                    self.refuse(session, 0, .bad_message, 0);
                    return self.finish(session);
                },
            };
            self.dispatch(session, &message);
            message.closeDescriptors();
            if (session.closed) return self.retireIfDone(session);
            return;
        }
        if (events & (linux.EPOLL.HUP | linux.EPOLL.RDHUP | linux.EPOLL.ERR) != 0) self.finish(session);
    }

    fn finish(self: *Control, session: *Session) void {
        self.close(session);
        self.retireIfDone(session);
    }

    fn retireIfDone(self: *Control, session: *Session) void {
        if (session.closed and session.outstanding == 0) self.retire(session);
    }

    fn dispatch(self: *Control, session: *Session, message: *Message) void {
        const head: *const control.MessageHeader = @ptrCast(&message.bytes);
        const kind: control.Kind = @enumFromInt(head.kind);
        const sequence = head.sequence;
        if (head.version != control.version) return self.refuse(session, sequence, .version_mismatch, 0);
        if ((session.ring != null) == (kind == .hello)) return self.refuse(session, sequence, .out_of_order, 0);
        switch (kind) {
            .hello => if (message.as(control.Hello)) |hello| {
                if (message.descriptor_count <= 1) return self.greet(session, hello, message.takeDescriptor());
            },
            .attach_thread => if (message.as(control.AttachThread)) |_| return self.attachThread(session, sequence),
            .register_file => if (message.as(control.RegisterFile)) |asked| {
                session.former_file_id = asked.former_file_id;
                if (message.descriptor_count == 1) return self.registerFile(session, sequence, message.takeDescriptor().?);
            },
            .release_file => if (message.as(control.ReleaseFile)) |asked| return self.askForHandle(session, sequence, .release, asked.handle, asked.file_id, 0),
            .fence_file => if (message.as(control.FenceFile)) |asked| return self.askForHandle(session, sequence, .fence, asked.handle, asked.file_id, asked.reason),
            .drain_file => if (message.as(control.DrainFile)) |_| {
                if (message.descriptor_count == 1) return self.drainFile(session, sequence, message.descriptors[0]);
            },
            .change_name => if (message.as(control.ChangeName)) |asked| {
                const descriptors = message.descriptors[0..message.descriptor_count];
                switch (asked.change) {
                    .moved => if (descriptors.len == 2 and isName(asked)) return self.nameMoves(session, asked, descriptors[0], descriptors[1]),
                    .removed => if (descriptors.len == 1) return self.nameGoes(session, sequence, descriptors[0]),
                    _ => {},
                }
            },
            .fetch_routes => if (message.as(control.FetchRoutes)) |_| {
                return self.reply(session, .routes, sequence, control.Routes{ .header = undefined, .routes_bytes = self.table_memory.len }, &.{self.routes_fd});
            },
            else => {},
        }
        self.state.counters.add(.messages_bad_total, 1);
        self.state.events.post(.warning, "control_message_bad", .{ .session = session.id, .pid = session.credentials.pid, .uid = session.credentials.uid, .kind = head.kind, .length_bytes = message.length, .reason = "its kind is unknown, or its length or descriptors do not fit its kind" });
        self.refuse(session, sequence, .bad_message, 0);
    }

    fn greet(self: *Control, session: *Session, hello: *const control.Hello, previous_ring: ?i32) void {
        var handed_back = previous_ring;
        defer if (handed_back) |fd| os.close(fd);
        const state = self.state;
        const sequence = hello.header.sequence;
        if (hello.ring_version != ring.version or hello.positions_version != positions.version or hello.routes_version != routes.version) {
            state.events.post(.warning, "client_of_another_version", .{ .session = session.id, .pid = session.credentials.pid, .ring_version = hello.ring_version, .our_ring_version = ring.version });
            return self.refuse(session, sequence, .version_mismatch, 0);
        }
        const before: ?*ServedRing = if (handed_back) |fd| self.ringBehind(fd) else null;
        // The worker is letting go of it: the client asks again, and gets it back or another one then.
        if (before) |known| if (known.leaving) return self.refuse(session, sequence, .stopping, 0);
        var adopted: ?*ServedRing = null;
        if (before == null) if (handed_back) |fd| {
            handed_back = null;
            adopted = self.adoptRing(session, fd);
        };
        const mine = if (before) |known| known.uid == session.credentials.uid else false;
        var errno: i32 = 0;
        const its = (if (mine) before else adopted orelse self.ringFor(session, &errno)) orelse
            return self.refuse(session, sequence, .limit_reached, errno);
        its.sessions += 1;
        session.ring = its;
        const runtime = std.mem.sliceTo(&hello.runtime, 0);
        if (state.stub) |stub| stub.sessionOpened(session.id, session.credentials.pid);
        state.events.post(.info, "session_opened", .{ .session = session.id, .pid = session.credentials.pid, .uid = session.credentials.uid, .runtime = runtime, .ring = its.index });
        self.reply(session, .welcome, sequence, control.Welcome{
            .header = undefined,
            .session = session.id,
            .ring_uuid = its.view.header().uuid,
            .ring_bytes = ring.file_size,
            .positions_bytes = positions.file_size,
            .routes_bytes = self.table_memory.len,
            .daemon_epoch = its.publisher.header().daemon_epoch,
            .test_stub = @intFromBool(state.stub != null),
            .reserved = 0,
        }, &.{ its.memory.client_fd, its.publisher.fd, self.routes_fd });
    }

    /// A ring serves one user: whoever can map it can read and forge what is in it. null: there are too many, or there
    /// is no memory for another.
    fn ringFor(self: *Control, session: *const Session, errno: *i32) ?*ServedRing {
        const state = self.state;
        const uid = session.credentials.uid;
        if (!state.ring_per_client) {
            for (self.rings) |each| {
                const known = each orelse continue;
                if (known.uid == uid and !known.leaving) return known;
            }
        }
        var failure = Failure{};
        return self.makeRing(uid, &failure) catch {
            errno.* = failure.errno;
            state.events.post(.@"error", "ring_refused", .{ .session = session.id, .pid = session.credentials.pid, .uid = uid, .errno = failure.errno, .reason = failure.message() });
            return null;
        };
    }

    fn makeRing(self: *Control, uid: u32, failure: *Failure) error{Failed}!*ServedRing {
        const index = try self.freeIndex(failure);
        var memory = try RingMemory.make(uid, failure);
        errdefer memory.close();
        return self.serveRing(memory, index, failure);
    }

    fn freeIndex(self: *const Control, failure: *Failure) error{Failed}!u7 {
        for (self.rings, 0..) |each, index| {
            if (each == null) return @intCast(index);
        }
        return failure.set(@intFromEnum(linux.E.USERS), "{d} rings are in use already, and no more can be served: one for each user, or, with ring.isolation: per_client, for each client", .{served_ring.rings_max});
    }

    /// The ring that we serve whose memory a client's descriptor is.
    fn ringBehind(self: *const Control, fd: i32) ?*ServedRing {
        const inode = RingMemory.inodeOf(fd) orelse return null;
        for (self.rings) |each| {
            const known = each orelse continue;
            if (std.meta.eql(known.memory.inode, inode)) return known;
        }
        return null;
    }

    /// A ring that an earlier daemon made, and that went with it for all but its clients: what was accepted in it is
    /// finished, and the client goes on in it. Takes `fd` over. null: it is none, and why is in the log.
    fn adoptRing(self: *Control, session: *const Session, fd: i32) ?*ServedRing {
        const uid = session.credentials.uid;
        var failure = Failure{};
        const adopted = adopted: {
            const index = self.freeIndex(&failure) catch {
                os.close(fd);
                break :adopted null;
            };
            var memory = RingMemory.adopt(fd, uid, &failure) catch break :adopted null;
            const uuid = served_ring.uuidOf(memory.view);
            for (self.rings) |each| {
                const known = each orelse continue;
                if (!std.mem.eql(u8, &known.uuid, &uuid)) continue;
                failure.set(@intFromEnum(linux.E.EXIST), "another ring has its uuid", .{}) catch {};
                memory.close();
                break :adopted null;
            }
            break :adopted self.serveRing(memory, index, &failure) catch {
                memory.close();
                break :adopted null;
            };
        };
        if (adopted) |made| {
            self.state.counters.add(.rings_adopted_total, 1);
            return made;
        }
        self.state.events.post(.warning, "ring_not_taken_back", .{ .session = session.id, .pid = session.credentials.pid, .uid = uid, .errno = failure.errno, .reason = failure.message() });
        return null;
    }

    fn serveRing(self: *Control, memory: RingMemory, index: u7, failure: *Failure) error{Failed}!*ServedRing {
        const state = self.state;
        const request = state.allocator.create(Request) catch return failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for a ring", .{});
        errdefer state.allocator.destroy(request);
        const made = try ServedRing.create(state.allocator, memory, index, &state.counters, failure);
        made.takeOver();
        made.publisher.header().routes_generation = self.routes_generation;
        made.publisher.header().marks_generation = self.marks_generation;
        request.* = .{ .kind = .serve_ring, .session = 0, .ring = made };
        // Before anything of its clients, whose requests come behind this one.
        state.postToWorker(request);
        self.rings[index] = made;
        state.events.post(.info, "ring_opened", .{ .ring = index, .uid = made.uid });
        return made;
    }

    /// One of its sessions is gone.
    fn leaveRing(self: *Control, its: *ServedRing) void {
        assert(its.sessions > 0);
        its.sessions -= 1;
        if (its.sessions == 0 and its != self.shared) self.askToLeave(its);
    }

    fn askToLeave(self: *Control, its: *ServedRing) void {
        const request = self.state.allocator.create(Request) catch return; // served on, for the next of its user
        request.* = .{ .kind = .leave_ring, .session = 0, .ring = its };
        its.leaving = true;
        self.state.postToWorker(request);
    }

    /// Its sessions end; their clients, where they have not died of it themselves, get another ring.
    fn ringLost(self: *Control, gone: *ServedRing) void {
        const state = self.state;
        state.counters.add(.rings_lost_total, 1);
        state.events.post(.@"error", "ring_lost", .{ .ring = gone.index, .uid = gone.uid, .reason = "somebody has cut its file short; its clients get another one" });
        gone.leaving = true;
        if (gone == self.shared) {
            self.shared = null;
            var failure = Failure{};
            self.shared = self.makeShared(&failure) catch blk: {
                state.events.post(.@"error", "ring_not_made", .{ .errno = failure.errno, .reason = failure.message() });
                break :blk null;
            };
        }
        if (gone.sessions == 0) return self.askToLeave(gone);
        var all = self.sessions_by_id.valueIterator();
        while (all.next()) |session| {
            if (session.*.ring == gone) self.close(session.*);
        }
    }

    fn makeShared(self: *Control, failure: *Failure) error{Failed}!*ServedRing {
        const index = try self.freeIndex(failure);
        _ = linux.unlink(self.state.ring_path);
        var memory = try RingMemory.open(self.state.ring_path, failure);
        errdefer memory.close();
        return self.serveRing(memory, index, failure);
    }

    fn attachThread(self: *Control, session: *Session, sequence: u32) void {
        const its = session.ring.?;
        for (&its.row_sessions, 0..) |*owner, row| {
            if (@atomicLoad(u64, owner, .acquire) != 0) continue;
            // Only this thread gives rows; the worker only frees them.
            @atomicStore(u64, owner, session.id, .release);
            const lease = ring.lease(its.publisher.header().daemon_epoch, session.id);
            @atomicStore(u64, &its.view.producerRow(@intCast(row)).session, lease, .seq_cst);
            self.state.counters.add(.threads_attached_total, 1);
            return self.reply(session, .thread_attached, sequence, control.ThreadAttached{ .header = undefined, .row = @intCast(row), .reserved = 0 }, &.{});
        }
        self.state.events.post(.warning, "threads_exhausted", .{ .session = session.id, .limit = ring.producer_rows });
        self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
    }

    // ---- files --------------------------------------------------------------------------------------

    fn keyOf(file: *const File) InodeKey {
        return .{ .device = file.identity.blob.device, .inode = file.identity.blob.inode };
    }

    /// `client_fd` is ours to close.
    fn registerFile(self: *Control, session: *Session, sequence: u32, client_fd: i32) void {
        var errno: i32 = 0;
        const refusal = refusal: {
            // Not for good: the next daemon takes it.
            if (@atomicLoad(bool, &self.state.stopping, .acquire)) {
                os.close(client_fd);
                return self.refuse(session, sequence, .stopping, 0);
            }
            if (session.ring.?.handle_used.count() == positions.handles_max) break :refusal .limit_reached;
            const found = self.fileFor(session, sequence, client_fd, &errno) catch |err| {
                const refusal = refusalOf(err, errno);
                const file = self.knownBehind(client_fd, refusal) orelse break :refusal refusal;
                // Others have it open, or had just now: nobody writes it natively beside what is on its way from them.
                self.ask(session, .{ .kind = .fence_unfit, .session = session.id, .sequence = sequence, .file = file, .client_fd = client_fd, .refusal = refusal }) catch break :refusal .limit_reached;
                file.questions += 1;
                return self.suspendReading(session);
            };
            return if (found) |file| self.giveHandle(session, sequence, client_fd, file, null) else self.suspendReading(session);
        };
        self.refuseFile(session, sequence, client_fd, refusal, errno);
    }

    /// The file that a descriptor would have been taken for, had it not become unfit meanwhile.
    fn knownBehind(self: *const Control, client_fd: i32, refusal: control.Refusal) ?*File {
        switch (refusal) {
            .no_name, .several_links, .not_on_a_route, .cannot_reopen => {},
            else => return null,
        }
        return switch (os.statOf(client_fd)) {
            .stat => |stat| self.registry.get(.{ .device = stat.device, .inode = stat.inode }),
            .errno => null,
        };
    }

    /// Once the worker agrees. `unfit`: it has been fenced for that, and is native from here on.
    fn giveHandle(self: *Control, session: *Session, sequence: u32, client_fd: i32, file: *File, unfit: ?control.Refusal) void {
        const its = session.ring.?;
        const handle = takeHandle(its) orelse return self.refuseFile(session, sequence, client_fd, .limit_reached, 0);
        session.handles.append(self.state.allocator, .{ .index = handle, .file = file }) catch {
            its.handle_used.unset(handle);
            return self.refuseFile(session, sequence, client_fd, .limit_reached, 0);
        };
        if (file.handles == 0) self.idle_files -= 1;
        file.handles += 1;
        os.close(client_fd); // before the worker needs a descriptor
        self.ask(session, .{ .kind = .activate, .session = session.id, .sequence = sequence, .ring = its, .file = file, .handle = handle, .refusal = unfit, .former_file_id = session.former_file_id }) catch {
            _ = session.handles.pop();
            file.handles -= 1;
            if (file.handles == 0) self.idle_files += 1;
            its.handle_used.unset(handle);
            return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.NOMEM));
        };
        self.suspendReading(session);
    }

    fn refusalOf(err: FileError, errno: i32) control.Refusal {
        // Whatever it was that needed a descriptor or memory.
        if (isLimit(errno)) return .limit_reached;
        return switch (err) {
            error.NotRegular => .not_a_regular_file,
            error.NotWritable => .not_open_for_writing,
            error.NoName => .no_name,
            error.SeveralLinks => .several_links,
            error.NoPath, error.NotOnARoute => .not_on_a_route,
            error.CannotReopen => .cannot_reopen,
            error.NoAttribute => .no_attribute,
            error.TargetFailed => .target_failed,
            error.OutOfMemory => .limit_reached,
            error.MarkedByAnother => .log_failed,
        };
    }

    fn refuseFile(self: *Control, session: *Session, sequence: u32, client_fd: i32, refusal: control.Refusal, errno: i32) void {
        const state = self.state;
        if (isLimit(errno) and self.hasSoonMore(session)) {
            os.close(client_fd);
            return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
        }
        state.counters.add(.files_refused_total, 1);
        var path: [4096]u8 = undefined;
        const text: []const u8 = if (os.pathOf(client_fd, &path)) |known| known else "?";
        state.events.post(.warning, "file_stays_native", .{ .session = session.id, .path = text, .reason = @tagName(refusal), .errno = errno, .hint = hintFor(refusal, errno) });
        os.close(client_fd);
        self.refuse(session, sequence, refusal, errno);
    }

    /// Of descriptors: files that are closed hold some, and are let go of at once now. The client asks again.
    fn hasSoonMore(self: *Control, session: *const Session) bool {
        if (self.idle_files == 0 and self.marking.count() == 0) return false;
        @atomicStore(bool, &self.state.descriptors_short, true, .release);
        self.state.wakeWorker();
        const now = os.monotonicNs();
        if (now -% self.short_at_ns >= std.time.ns_per_s) {
            self.short_at_ns = now;
            self.state.events.post(.warning, "descriptors_exhausted", .{ .session = session.id, .pid = session.credentials.pid, .hint = out_of_descriptors });
        }
        return true;
    }

    fn isLimit(errno: i32) bool {
        return switch (@as(linux.E, @enumFromInt(errno))) {
            .MFILE, .NFILE, .NOMEM => true,
            else => false,
        };
    }

    fn hintFor(refusal: control.Refusal, errno: i32) []const u8 {
        return switch (@as(linux.E, @enumFromInt(errno))) {
            .MFILE => out_of_descriptors,
            .NFILE => "the host is out of file descriptors: raise fs.file-max",
            .NOMEM => "the daemon is out of memory",
            else => switch (refusal) {
                .no_name => "a file that was removed cannot be found after a crash",
                .several_links => "a file with several names cannot be told apart after a crash",
                .no_attribute => "its file system, or what is set on it, takes no attribute user.elgate",
                .cannot_reopen => "the daemon's user must be able to open it for writing by its path",
                .limit_reached => "too many files are open through Elgate",
                .log_failed => "it carries the mark of another daemon's log, which may hold more than the file does: that daemon must be started, and stopped, before a test stub takes it",
                else => "",
            },
        };
    }

    const out_of_descriptors = "the daemon is out of file descriptors: raise its RLIMIT_NOFILE (ulimit -Hn, LimitNOFILE= of its service) and start it again";

    /// For a client that has the file open for reading only: it has no handle, and so no place in a ring.
    fn drainFile(self: *Control, session: *Session, sequence: u32, client_fd: i32) void {
        const stat = switch (os.statOf(client_fd)) {
            .stat => |stat| stat,
            .errno => |errno| return self.refuse(session, sequence, .not_a_regular_file, errno),
        };
        // Of a file that we do not know nothing is under way: its mark is another daemon's.
        const file = self.registry.get(.{ .device = stat.device, .inode = stat.inode }) orelse
            return self.reply(session, .file_drained, sequence, control.Done{ .header = undefined }, &.{});
        self.ask(session, .{ .kind = .drain, .session = session.id, .sequence = sequence, .file = file }) catch
            return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.NOMEM));
        file.questions += 1;
        self.suspendReading(session);
    }

    fn isName(asked: *const control.ChangeName) bool {
        if (asked.name_length == 0 or asked.name_length > control.name_bytes_max) return false;
        return std.mem.indexOfAny(u8, asked.name[0..asked.name_length], "/\x00") == null;
    }

    /// A file, or a directory above files, is about to get another name. What is not ours to find again needs none.
    fn nameMoves(self: *Control, session: *Session, asked: *const control.ChangeName, client_fd: i32, directory_fd: i32) void {
        const sequence = asked.header.sequence;
        const change = self.state.allocator.create(names.Change) catch return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.NOMEM));
        defer self.state.allocator.destroy(change);
        change.* = .{};
        const directory = os.pathOf(directory_fd, &change.path_buffer) orelse return self.refuse(session, sequence, .not_on_a_route, @intFromEnum(linux.E.NOENT));
        const name = asked.name[0..asked.name_length];
        const at = if (directory.len == 1) 0 else directory.len;
        if (at + 1 + name.len >= change.path_buffer.len) return self.refuse(session, sequence, .not_on_a_route, @intFromEnum(linux.E.NAMETOOLONG));
        change.path_buffer[at] = '/';
        @memcpy(change.path_buffer[at + 1 ..][0..name.len], name);
        change.path_length = at + 1 + name.len;
        const stat = switch (os.statOf(client_fd)) {
            .stat => |stat| stat,
            .errno => |errno| return self.refuse(session, sequence, .not_a_regular_file, errno),
        };
        session.change_errno = 0;
        if (self.isBeingMarked(stat)) return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
        if (stat.isDirectory()) {
            const below = os.pathOf(client_fd, &change.below_buffer) orelse return self.refuse(session, sequence, .not_on_a_route, @intFromEnum(linux.E.NOENT));
            change.below_length = below.len;
            self.fenceLeavingBelow(session, sequence, change);
            for (0..self.state.routeCount()) |route| self.askToChange(session, .{ .kind = .moved_below, .session = session.id, .sequence = sequence, .route = @intCast(route) }, change);
        } else if (self.registry.get(.{ .device = stat.device, .inode = stat.inode })) |file| {
            file.removal_said_by = 0;
            self.askToChange(session, .{ .kind = .moved, .session = session.id, .sequence = sequence, .file = file, .leaves_route = !self.takesPath(change.path()) }, change);
        }
        self.awaitChanges(session, sequence);
    }

    /// Whoever opens a file there goes through Elgate.
    fn takesPath(self: *const Control, path: []const u8) bool {
        const entry = self.table.match(path) orelse return false;
        return !entry.flags.retired;
    }

    /// The files of a directory that moves to where no route is.
    fn fenceLeavingBelow(self: *Control, session: *Session, sequence: u32, change: *const names.Change) void {
        const own = self.state.allocator.create(names.Change) catch {
            session.change_errno = @intFromEnum(linux.E.NOMEM);
            return;
        };
        defer self.state.allocator.destroy(own);
        own.* = .{};
        var known = self.registry.valueIterator();
        while (known.next()) |entry| {
            var buffer: [4096]u8 = undefined;
            const new = change.carried(os.pathOf(entry.*.fd, &buffer) orelse continue, &own.path_buffer) orelse continue;
            own.path_length = new.len;
            if (!self.takesPath(new)) self.askToChange(session, .{ .kind = .moved, .session = session.id, .sequence = sequence, .file = entry.*, .leaves_route = true }, own);
        }
    }

    /// A file is about to lose the name that it has.
    fn nameGoes(self: *Control, session: *Session, sequence: u32, client_fd: i32) void {
        const stat = switch (os.statOf(client_fd)) {
            .stat => |stat| stat,
            .errno => |errno| return self.refuse(session, sequence, .not_a_regular_file, errno),
        };
        session.change_errno = 0;
        if (self.isBeingMarked(stat)) return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.AGAIN));
        if (self.registry.get(.{ .device = stat.device, .inode = stat.inode })) |file| {
            file.removal_said_by = session.id;
            self.askToChange(session, .{ .kind = .removed, .session = session.id, .sequence = sequence, .file = file }, null);
        }
        self.awaitChanges(session, sequence);
    }

    /// The log cannot say anything of it yet: the client asks again in a moment.
    fn isBeingMarked(self: *const Control, stat: os.Stat) bool {
        const marking = self.marking.get(.{ .device = stat.device, .inode = stat.inode }) orelse return false;
        return marking.job.kind == .mark;
    }

    fn askToChange(self: *Control, session: *Session, request: Request, change: ?*const names.Change) void {
        var asked = request;
        if (change) |given| {
            const own = self.state.allocator.create(names.Change) catch {
                session.change_errno = @intFromEnum(linux.E.NOMEM);
                return;
            };
            own.* = given.*;
            asked.change = own;
        }
        self.ask(session, asked) catch {
            if (asked.change) |own| self.state.allocator.destroy(own);
            session.change_errno = @intFromEnum(linux.E.NOMEM);
            return;
        };
        session.changes += 1;
        if (request.file) |file| file.questions += 1;
    }

    fn awaitChanges(self: *Control, session: *Session, sequence: u32) void {
        if (session.changes > 0) self.suspendReading(session) else self.changesNoted(session, sequence);
    }

    fn changesNoted(self: *Control, session: *Session, sequence: u32) void {
        if (session.closed) return;
        if (session.change_errno != 0) return self.refuse(session, sequence, .log_failed, session.change_errno);
        self.reply(session, .name_noted, sequence, control.Done{ .header = undefined }, &.{});
    }

    /// Of a client that is gone: what it was about to remove and has not removed has its name still.
    fn keepNames(self: *Control, session: *Session) void {
        var known = self.registry.valueIterator();
        while (known.next()) |entry| {
            const file = entry.*;
            if (file.removal_said_by != session.id) continue;
            file.removal_said_by = 0;
            if (os.linksOf(file.fd) orelse 0 == 0) continue;
            const change = self.state.allocator.create(names.Change) catch continue;
            defer self.state.allocator.destroy(change);
            change.* = .{};
            const path = os.pathOf(file.fd, &change.path_buffer) orelse continue;
            change.path_length = path.len;
            self.askToChange(session, .{ .kind = .moved, .session = session.id, .file = file }, change);
        }
    }

    fn takeHandle(its: *ServedRing) ?u32 {
        // Round and round, so that a number comes back as late as it can.
        for (0..positions.handles_max) |_| {
            const index = its.next_handle;
            its.next_handle = (its.next_handle + 1) % positions.handles_max;
            if (its.handle_used.isSet(index)) continue;
            its.handle_used.set(index);
            return index;
        }
        return null;
    }

    const FileError = files.Unfit || error{ NoAttribute, TargetFailed, NotOnARoute, OutOfMemory, MarkedByAnother };

    /// The File of the inode behind a client's descriptor, opened by our own rights. null: it is to be marked first, or is
    /// just being unmarked; the session's message is looked at again when that is done, and the descriptor kept so long.
    fn fileFor(self: *Control, session: *Session, sequence: u32, client_fd: i32, errno: *i32) FileError!?*File {
        const state = self.state;
        const allocator = state.allocator;
        const marking = try allocator.create(Marking);
        errdefer allocator.destroy(marking);
        marking.* = .{ .key = undefined, .job = .{ .kind = .mark, .device = 0, .fd = -1 } };
        const identity = &marking.job.identity;
        const fd = try files.reopen(client_fd, identity, errno);
        errdefer os.close(fd);
        const key = InodeKey{ .device = identity.blob.device, .inode = identity.blob.inode };
        // It stays on its route until nothing in that one's log is for it any more, whatever the routes are by now; but not
        // where clients know nothing of that route.
        if (self.registry.get(key)) |file| {
            if (!self.isListed(file.route)) return error.NotOnARoute;
            if (!file.open_for_writing) {
                // It was kept open for reading only, or by replay: write to it through the new description.
                if (os.check(linux.dup3(fd, file.fd, @bitCast(linux.O{ .CLOEXEC = true }))) == .errno) return error.CannotReopen;
                file.open_for_writing = true;
            }
            os.close(fd);
            allocator.destroy(marking);
            return file;
        }
        const entry = self.table.match(identity.pathText()) orelse return error.NotOnARoute;
        if (entry.flags.retired) return error.NotOnARoute;
        const place = try self.marking.getOrPut(allocator, key);
        if (place.found_existing) {
            try place.value_ptr.*.waiting.append(allocator, .{ .session = session, .sequence = sequence, .client_fd = client_fd });
            os.close(fd);
            allocator.destroy(marking);
        } else {
            errdefer _ = self.marking.remove(key);
            try marking.waiting.append(allocator, .{ .session = session, .sequence = sequence, .client_fd = client_fd });
            const route = state.route(entry.route);
            marking.key = key;
            marking.job.device = key.device;
            marking.job.fd = fd;
            marking.job.route = route.index;
            marking.job.log_uuid = route.log.uuid;
            if (state.stub != null) {
                marking.job.sync = .left_out;
                // A real log may hold more for it than the file does.
                if (files.readAttribute(fd)) |mark| if (!std.mem.eql(u8, &mark.log_uuid, &route.log.uuid)) {
                    errno.* = @intFromEnum(linux.E.BUSY);
                    return error.MarkedByAnother;
                };
            }
            // An attribute of this very log on a file that is not known: its log window is over, take it anew.
            marking.job.file_id = newFileId();
            place.value_ptr.* = marking;
            self.marks.give(&marking.job);
        }
        session.outstanding += 1;
        return null;
    }

    const F_DUPFD_CLOEXEC = 1030;

    fn takeMarked(self: *Control) void {
        while (self.marks.takeDone()) |job| {
            const marking: *Marking = @fieldParentPtr("job", job);
            if (job.kind == .mark and job.failed == null) {
                steps.reached(.marked);
                const awaited = for (marking.waiting.items) |waiting| {
                    if (!waiting.session.closed) break true;
                } else false;
                if (!awaited) {
                    self.endMarking(marking, .nobody_asks);
                    job.kind = .unmark;
                    self.marks.give(job);
                    continue;
                }
                self.makeFile(marking) catch {
                    job.failed = error.TargetFailed;
                    job.errno = @intFromEnum(linux.E.NOMEM);
                };
            }
            if (job.fd >= 0) os.close(job.fd);
            _ = self.marking.remove(marking.key);
            self.endMarking(marking, .done);
            if (job.kind == .mark) self.endRetired(job.route);
            marking.waiting.deinit(self.state.allocator);
            self.state.allocator.destroy(marking);
        }
    }

    /// The file carries the mark. Its descriptor is the job's up to here.
    fn makeFile(self: *Control, marking: *Marking) error{OutOfMemory}!void {
        const state = self.state;
        const job = &marking.job;
        self.marks_generation +%= 1;
        for (self.rings) |each| if (each) |served| @atomicStore(u32, &served.publisher.header().marks_generation, self.marks_generation, .seq_cst);
        const file = try state.allocator.create(File);
        errdefer state.allocator.destroy(file);
        try self.registry.put(state.allocator, marking.key, file);
        self.idle_files += 1;
        // It may have been renamed meanwhile.
        var path: [4096]u8 = undefined;
        if (os.pathOf(job.fd, &path)) |now| {
            @memcpy(job.identity.path[0..now.len], now);
            job.identity.blob.path_length = @intCast(now.len);
        }
        file.* = .{ .file_id = job.file_id, .route = job.route, .log = state.route(job.route).log, .identity = job.identity, .fd = job.fd, .sync_fd = files.openForSync(job.fd), .open_for_writing = true };
        job.fd = -1;
        state.counters.add(.files_open, 1);
    }

    /// Those who wait for it go on.
    fn endMarking(self: *Control, marking: *Marking, how: enum { done, nobody_asks }) void {
        // What is looked at again may have to wait again, for another job.
        var waiting_list = marking.waiting;
        marking.waiting = .empty;
        defer waiting_list.deinit(self.state.allocator);
        for (waiting_list.items) |waiting| {
            const session = waiting.session;
            session.outstanding -= 1;
            if (session.closed) {
                os.close(waiting.client_fd);
                self.retireIfDone(session);
                continue;
            }
            assert(how == .done);
            self.resumeReading(session);
            if (marking.job.failed) |err| {
                self.refuseFile(session, waiting.sequence, waiting.client_fd, refusalOf(err, marking.job.errno), marking.job.errno);
            } else if (self.registry.get(marking.key)) |file| {
                self.giveHandle(session, waiting.sequence, waiting.client_fd, file, null);
            } else self.registerFile(session, waiting.sequence, waiting.client_fd);
        }
    }

    /// The log no longer holds anything for the file: who finds it without a daemon may use it natively.
    fn takeMarkOff(self: *Control, key: InodeKey, fd: i32) void {
        const allocator = self.state.allocator;
        const own = os.descriptor(linux.fcntl(fd, F_DUPFD_CLOEXEC, 0));
        if (own == .errno) return files.unmark(fd);
        const marking = allocator.create(Marking) catch {
            os.close(own.fd);
            return files.unmark(fd);
        };
        marking.* = .{ .key = key, .job = .{ .kind = .unmark, .device = key.device, .fd = own.fd } };
        self.marking.put(allocator, key, marking) catch {
            os.close(own.fd);
            allocator.destroy(marking);
            return files.unmark(fd);
        };
        self.marks.give(&marking.job);
    }

    fn newFileId() u64 {
        while (true) {
            const id = os.randomU64();
            if (id != 0) return id;
        }
    }

    fn askForHandle(self: *Control, session: *Session, sequence: u32, kind: Request.Kind, index: u32, file_id: u64, reason: u32) void {
        for (session.handles.items) |*handle| {
            if (handle.index != index or handle.file.file_id != file_id) continue;
            if (kind == .release) handle.releasing = true;
            self.ask(session, .{ .kind = kind, .session = session.id, .sequence = sequence, .ring = session.ring.?, .file = handle.file, .handle = index, .reason = reason }) catch
                return self.refuse(session, sequence, .limit_reached, @intFromEnum(linux.E.NOMEM));
            return self.suspendReading(session);
        }
        self.refuse(session, sequence, .unknown_handle, @intFromEnum(linux.E.BADF));
    }

    fn suspendReading(self: *Control, session: *Session) void {
        session.busy = true;
        self.watch(session.fd, linux.EPOLL.CTL_MOD, linux.EPOLL.RDHUP);
    }

    fn resumeReading(self: *Control, session: *Session) void {
        session.busy = false;
        self.watch(session.fd, linux.EPOLL.CTL_MOD, linux.EPOLL.IN | linux.EPOLL.RDHUP);
    }

    // ---- the worker's answers -----------------------------------------------------------------------

    fn takeAnswers(self: *Control) void {
        var count: u64 = 0;
        _ = linux.read(self.state.control_eventfd, std.mem.asBytes(&count), 8);
        var next = self.state.to_control.takeAll();
        while (next) |request| {
            next = request.next;
            self.answered(request);
        }
        self.takeMarked();
    }

    fn answered(self: *Control, request: *Request) void {
        const state = self.state;
        switch (request.kind) {
            .offer_file => {
                // Opened again meanwhile: then the worker is told that nothing comes of it.
                const wanted = request.file.?.handles != 0 or request.file.?.questions != 0;
                request.* = .{ .kind = .forget_file, .session = 0, .file = request.file, .errno = if (wanted) @intFromEnum(linux.E.BUSY) else 0 };
                return state.postToWorker(request);
            },
            .forget_file => {
                if (request.errno == 0 and request.file.?.handles == 0 and request.file.?.questions == 0) self.forgetFile(request.file.?);
                return state.allocator.destroy(request);
            },
            .serve_ring => return state.allocator.destroy(request),
            .fence_stray => {
                var path: [4096]u8 = undefined;
                state.events.post(.info, "file_went_native", .{ .path = nameOf(request.file.?, &path), .errno = request.errno });
                return state.allocator.destroy(request);
            },
            .ring_lost => {
                self.ringLost(request.ring.?);
                return state.allocator.destroy(request);
            },
            .leave_ring => {
                const gone = request.ring.?;
                state.events.post(.info, "ring_closed", .{ .ring = gone.index, .uid = gone.uid });
                self.rings[gone.index] = null;
                gone.destroy(state.allocator);
                return state.allocator.destroy(request);
            },
            else => {},
        }
        defer state.allocator.destroy(request);
        const session = self.sessions_by_id.get(request.session).?;
        session.outstanding -= 1;
        switch (request.kind) {
            .activate => {
                const file = request.file.?;
                if (request.errno != 0) {
                    self.dropHandle(session, request.handle, true);
                    if (!session.closed) self.refuse(session, request.sequence, request.refusal orelse .log_failed, request.errno);
                } else {
                    if (state.stub) |stub| stub.happened(.open, session.id, file, 0, 0, "");
                    state.counters.add(.files_registered_total, 1);
                    if (request.native and !session.closed) closeForWriting(file);
                    if (!session.closed) self.reply(session, .file_registered, request.sequence, control.FileRegistered{
                        .header = undefined,
                        .file_id = file.file_id,
                        .handle = request.handle,
                        .route = file.route,
                    }, &.{});
                }
            },
            .release => {
                if (state.stub) |stub| stub.happened(.close, session.id, request.file.?, 0, request.errno, "");
                self.dropHandle(session, request.handle, request.errno == 0);
                if (!session.closed) self.reply(session, .file_released, request.sequence, control.Done{ .header = undefined }, &.{});
            },
            .fence => {
                const file = request.file.?;
                if (state.stub) |stub| if (request.native) stub.happened(.native, session.id, file, request.reason, 0, "");
                var path: [4096]u8 = undefined;
                state.events.post(.info, "file_went_native", .{ .session = session.id, .path = nameOf(file, &path), .reason = request.reason, .errno = request.errno });
                // With a session that has closed, its release may have been served, and another routed since.
                if (request.native and !session.closed) closeForWriting(file);
                if (!session.closed) {
                    if (request.errno != 0) {
                        self.refuse(session, request.sequence, .log_failed, request.errno);
                    } else self.reply(session, .file_fenced, request.sequence, control.Done{ .header = undefined }, &.{});
                }
            },
            .fence_unfit => {
                const file = request.file.?;
                file.questions -= 1;
                var path: [4096]u8 = undefined;
                state.events.post(.info, "file_went_native", .{ .session = session.id, .path = nameOf(file, &path), .reason = @tagName(request.refusal.?), .errno = request.errno });
                if (session.closed) {
                    os.close(request.client_fd);
                } else if (request.errno != 0) {
                    self.refuseFile(session, request.sequence, request.client_fd, .log_failed, request.errno);
                } else {
                    // So that it stays native until this one has closed it too.
                    self.resumeReading(session);
                    return self.giveHandle(session, request.sequence, request.client_fd, file, request.refusal);
                }
            },
            .drain => {
                request.file.?.questions -= 1;
                if (!session.closed) {
                    if (request.errno != 0) {
                        self.refuse(session, request.sequence, .log_failed, request.errno);
                    } else self.reply(session, .file_drained, request.sequence, control.Done{ .header = undefined }, &.{});
                }
            },
            .moved, .moved_below, .removed => {
                if (request.file) |file| {
                    if (state.stub) |stub| if (request.errno == 0) stub.happened(if (request.kind == .removed) .unlink else .rename, session.id, file, 0, 0, if (request.change) |change| change.path() else "");
                    file.questions -= 1;
                }
                if (request.change) |change| state.allocator.destroy(change);
                if (request.errno != 0) session.change_errno = request.errno;
                session.changes -= 1;
                if (session.changes > 0) return; // it waits for all of them
                self.changesNoted(session, request.sequence);
            },
            .forget_session => {},
            .fence_stray, .offer_file, .forget_file, .serve_ring, .leave_ring, .ring_lost => unreachable,
        }
        if (session.closed) self.retireIfDone(session) else if (session.busy) self.resumeReading(session);
    }

    /// As the kernel knows it: what the log knows is the worker's.
    fn nameOf(file: *const File, buffer: *[4096]u8) []const u8 {
        return os.pathOf(file.fd, buffer) orelse "?";
    }

    fn dropHandle(self: *Control, session: *Session, index: u32, quiet: bool) void {
        for (session.handles.items, 0..) |handle, i| {
            if (handle.index != index) continue;
            _ = session.handles.swapRemove(i);
            session.ring.?.handle_used.unset(index);
            handle.file.handles -= 1;
            if (handle.file.handles > 0) return;
            self.idle_files += 1;
            if (quiet) closeForWriting(handle.file);
            return;
        }
    }

    /// So that a program that was just written can be executed.
    fn closeForWriting(file: *File) void {
        if (file.sync_fd == file.fd) return; // unreadable for us: then it stays open for writing until the checkpoint
        if (os.check(linux.dup3(file.sync_fd, file.fd, @bitCast(linux.O{ .CLOEXEC = true }))) == .errno) return;
        file.open_for_writing = false;
    }

    fn forgetFile(self: *Control, file: *File) void {
        _ = self.registry.remove(keyOf(file));
        self.idle_files -= 1;
        self.takeMarkOff(keyOf(file), file.fd);
        self.state.counters.subtract(.files_open, 1);
        const route = file.route;
        destroyFile(self.state, file);
        self.endRetired(route);
    }

    fn destroyFile(state: *State, file: *File) void {
        files.closeDescriptors(file);
        file.handle_list.deinit(state.allocator);
        file.naming.deinit(state.allocator);
        state.allocator.destroy(file);
    }

    // ---- routes -------------------------------------------------------------------------------------

    fn isListed(self: *const Control, route: u32) bool {
        for (0..self.table.header().count) |index| if (self.table.entry(@intCast(index)).route == route) return true;
        return false;
    }

    const Listed = struct { route: *Route, flags: routes.Flags, pattern: []const u8 };
    const List = std.ArrayListUnmanaged(Listed);

    /// Makes the table that clients get from now on: `order` is the configuration's (first match wins), and behind it what
    /// is gone from that, as long as it has files. With `mutex` held, or before `run`.
    pub fn publishRoutes(self: *Control, order: []const *Route, failure: *Failure) error{Failed}!void {
        var list = List.empty;
        defer list.deinit(self.state.allocator);
        for (order) |route| list.append(self.state.allocator, .{ .route = route, .flags = route.flags, .pattern = route.pattern }) catch return outOfMemory(order.len, failure);
        self.listRetired(&list, order.len) catch return outOfMemory(order.len, failure);
        return self.publish(list.items, failure);
    }

    /// Adds what the present table has, and the new one would not.
    fn listRetired(self: *Control, list: *List, kept: usize) error{OutOfMemory}!void {
        if (self.table_memory.len == 0) return;
        for (0..self.table.header().count) |index| {
            const entry = self.table.entry(@intCast(index));
            const pattern = self.table.pattern(entry);
            const stays = for (list.items[0..kept]) |other| {
                if (other.route.index == entry.route and std.mem.eql(u8, other.pattern, pattern)) break true;
            } else false;
            if (stays or !self.hasFiles(entry.route)) continue;
            var flags = entry.flags;
            flags.retired = true;
            try list.append(self.state.allocator, .{ .route = self.state.route(entry.route), .flags = flags, .pattern = pattern });
            self.retired_routes.set(entry.route);
        }
    }

    fn hasFiles(self: *const Control, route: u32) bool {
        var known = self.registry.valueIterator();
        while (known.next()) |file| if (file.*.route == route) return true;
        var marking = self.marking.valueIterator();
        while (marking.next()) |each| if (each.*.job.kind == .mark and each.*.job.route == route) return true;
        return false;
    }

    /// The last file of a route that is gone from the configuration has gone: so do its entries.
    fn endRetired(self: *Control, route: u32) void {
        if (!self.retired_routes.isSet(route) or self.hasFiles(route)) return;
        var list = List.empty;
        defer list.deinit(self.state.allocator);
        for (0..self.table.header().count) |index| {
            const entry = self.table.entry(@intCast(index));
            if (entry.flags.retired and entry.route == route) continue;
            list.append(self.state.allocator, .{ .route = self.state.route(entry.route), .flags = entry.flags, .pattern = self.table.pattern(entry) }) catch return;
        }
        var failure = Failure{};
        self.publish(list.items, &failure) catch return; // with the next reload
        self.retired_routes.unset(route);
    }

    fn outOfMemory(count: usize, failure: *Failure) error{Failed} {
        failure.set(@intFromEnum(linux.E.NOMEM), "out of memory for the table of {d} routes", .{count}) catch return error.Failed;
    }

    fn publish(self: *Control, list: []const Listed, failure: *Failure) error{Failed}!void {
        const allocator = self.state.allocator;
        var total: usize = @sizeOf(routes.TableHeader) + list.len * @sizeOf(routes.Entry);
        for (list) |each| total += each.pattern.len + each.route.name.len;
        if (total > routes.table_bytes_max) return failure.set(@intFromEnum(linux.E.@"2BIG"), "the table of routes would have {d} bytes, more than {d}, with those that are gone and have files open: close these, or restart the daemon", .{ total, routes.table_bytes_max });
        const memory = allocator.alignedAlloc(u8, .@"8", total) catch return outOfMemory(list.len, failure);
        errdefer allocator.free(memory);
        const header: *routes.TableHeader = @ptrCast(memory.ptr);
        const generation = self.routes_generation +% 1;
        header.* = .{ .magic = routes.magic, .version = routes.version, .count = @intCast(list.len), .generation = generation, .reserved = 0, .total_bytes = total };
        const entries: [*]routes.Entry = @ptrCast(memory.ptr + @sizeOf(routes.TableHeader));
        var at: u32 = @intCast(@sizeOf(routes.TableHeader) + list.len * @sizeOf(routes.Entry));
        for (list, 0..) |each, i| {
            const name = each.route.name;
            entries[i] = .{
                .route = each.route.index,
                .flags = each.flags,
                .pattern_offset = at,
                .pattern_length = @intCast(each.pattern.len),
                .name_offset = at + @as(u32, @intCast(each.pattern.len)),
                .name_length = @intCast(name.len),
                .reserved = 0,
            };
            @memcpy(memory[at..][0..each.pattern.len], each.pattern);
            @memcpy(memory[at + each.pattern.len ..][0..name.len], name);
            at += @intCast(each.pattern.len + name.len);
        }
        const fd = switch (os.descriptor(linux.memfd_create("elgate-routes", linux.MFD.CLOEXEC | linux.MFD.ALLOW_SEALING))) {
            .fd => |fd| fd,
            .errno => |errno| return failure.set(errno, "cannot make the route table (memfd_create): {s}", .{Failure.nameOf(errno)}),
        };
        errdefer os.close(fd);
        const written = os.check(linux.pwrite(fd, memory.ptr, memory.len, 0)).ok() orelse 0;
        if (written != memory.len) return failure.set(@intFromEnum(linux.E.NOMEM), "cannot write the route table of {d} bytes: the host is short of memory", .{memory.len});
        const add_seals = 1033;
        _ = linux.fcntl(fd, add_seals, 0x1 | 0x2 | 0x4 | 0x8); // seal, shrink, grow, write

        if (self.routes_fd >= 0) os.close(self.routes_fd);
        allocator.free(self.table_memory);
        self.routes_fd = fd;
        self.table_memory = memory;
        self.table = routes.Table.init(memory) catch unreachable;
        self.routes_generation = generation;
        for (self.rings) |each| if (each) |served| @atomicStore(u32, &served.publisher.header().routes_generation, generation, .release);
    }
};
