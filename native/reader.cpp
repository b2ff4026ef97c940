// Reader: large reads of a few files, past the page cache, many in flight.
//
// A read is cut into requests of at most `request` bytes. One thread drives an io_uring (raw system calls), or `depth`
// threads call pread; both take requests from one queue, so that a caller cannot tell them apart. Files are opened with
// O_DIRECT where the file system has it; elsewhere what was read is dropped from the page cache again, because a cyclic
// scan through a cache smaller than the files never hits and only costs memory.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#if defined(__linux__) && __has_include(<linux/io_uring.h>)
#define LOWBIT_URING 1
#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#endif

namespace nb = nanobind;

namespace {

constexpr uint64_t kPage = 4096;

struct File {
    std::string path;
    std::atomic<int> fd{-1};
    std::atomic<bool> direct{false};

    void open_it(bool try_direct) {
#ifdef O_DIRECT
        if (try_direct) {
            fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
            direct = fd >= 0;
        }
#endif
        if (fd < 0) fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
        if (fd < 0) throw std::runtime_error(path + ": " + std::strerror(errno));
    }

    // Some file systems accept O_DIRECT at open and refuse it at the first read.
    void leave_direct() {
#ifdef O_DIRECT
        int flags = ::fcntl(fd, F_GETFL);
        ::fcntl(fd, F_SETFL, flags & ~O_DIRECT);
#endif
        direct = false;
    }
};

struct Request {
    File* file = nullptr;
    uint64_t ticket = 0;
    uint64_t offset = 0;
    uint64_t length = 0;  // whole pages
    uint64_t needed = 0;  // up to here the file must reach; only less than length at its end
    char* to = nullptr;
    bool direct = false;  // as it was asked for
};

class Reader {
public:
    Reader(const std::vector<std::string>& paths, unsigned depth, uint64_t request, const std::string& engine,
           bool direct)
        : depth_(depth), request_((request + kPage - 1) / kPage * kPage), files_(paths.size()) {
        if (depth < 1 || depth > 256 || request < kPage) throw std::invalid_argument("depth 1-256, request >= 4096");
        if (engine != "auto" && engine != "uring" && engine != "threads")
            throw std::invalid_argument("engine is auto, uring or threads");
        try {
            for (size_t i = 0; i < paths.size(); ++i) {
                files_[i].path = paths[i];
                files_[i].open_it(direct);
            }
            uring_ = engine != "threads" && open_ring();
            if (engine == "uring" && !uring_) throw std::runtime_error("this kernel refuses io_uring");
        } catch (...) {
            release();
            throw;
        }
        unsigned count = uring_ ? 1 : depth_;
        try {
            for (unsigned i = 0; i < count; ++i)
                workers_.emplace_back([this] { uring_ ? drive_ring() : drive_pread(); });
        } catch (...) {
            close();
            throw;
        }
    }

    ~Reader() { close(); }

    // Begin to read [offset, offset + length) of a file into memory with room for whole pages; returns a ticket.
    uint64_t submit(size_t file, uint64_t offset, uint64_t length, uint64_t address) {
        if (file >= files_.size()) throw std::invalid_argument("no such file");
        if (offset % kPage || address % kPage || length == 0)
            throw std::invalid_argument("offset and address are whole pages, length is positive");
        std::lock_guard<std::mutex> hold(lock_);
        if (closing_) throw std::runtime_error("the reader is closed");
        uint64_t ticket = next_++;
        auto& state = tickets_[ticket];
        for (uint64_t done = 0; done < length; done += request_) {
            uint64_t needed = std::min(request_, length - done);
            queue_.push_back({&files_[file], ticket, offset + done, (needed + kPage - 1) / kPage * kPage, needed,
                              reinterpret_cast<char*>(address) + done, files_[file].direct});
            ++state.left;
        }
        work_.notify_all();
        return ticket;
    }

    // Wait until everything of a ticket has arrived; returns what went wrong, or nothing. A ticket is waited for once.
    std::string wait(uint64_t ticket) {
        std::unique_lock<std::mutex> hold(lock_);
        auto found = tickets_.find(ticket);
        if (found == tickets_.end()) throw std::invalid_argument("no such ticket");
        done_.wait(hold, [&] { return tickets_[ticket].left == 0; });
        std::string error = std::move(tickets_[ticket].error);
        tickets_.erase(ticket);
        return error;
    }

    // Forget what has not begun, wait for what has, and close the files.
    void close() {
        if (::getpid() != owner_) {  // a forked child has neither the threads nor the right to its parent's files
            for (auto& worker : workers_) worker.detach();
            workers_.clear();
            return;
        }
        {
            std::lock_guard<std::mutex> hold(lock_);
            closing_ = true;
            for (auto& request : queue_) finish(request, "the reader was closed");
            queue_.clear();
            work_.notify_all();
        }
        for (auto& worker : workers_) worker.join();
        workers_.clear();
        release();
    }

    std::string engine() const { return uring_ ? "uring" : "threads"; }

    bool direct() const {
        return std::all_of(files_.begin(), files_.end(), [](const File& f) { return f.direct.load(); });
    }

private:
    struct State {
        uint64_t left = 0;
        std::string error;
    };

    // With the lock held.
    void finish(const Request& request, const std::string& error) {
        auto& state = tickets_[request.ticket];
        if (!error.empty() && state.error.empty()) state.error = error;
        if (--state.left == 0) done_.notify_all();
    }

    // What a read of `result` bytes (or minus an errno) means; true when the rest of it must be asked for again.
    bool again(Request& request, int64_t result) {
        File& file = *request.file;
        std::string error;
        if (result == -EINTR || result == -EAGAIN) return true;
        if (result == -EINVAL && request.direct) {  // others in flight may have left it already
            request.direct = false;
            file.leave_direct();
            return true;
        }
        if (result < 0) {
            error = std::strerror(static_cast<int>(-result));
        } else if (static_cast<uint64_t>(result) < request.needed) {
            uint64_t got = static_cast<uint64_t>(result) / kPage * kPage;  // direct reads begin on whole pages
            if (got > 0) {
                request.offset += got, request.to += got, request.length -= got, request.needed -= got;
                return true;
            }
            struct stat held;
            auto end = ::fstat(file.fd, &held) == 0 ? static_cast<uint64_t>(held.st_size) : request.offset + result;
            error = "ends at byte " + std::to_string(end) + ", too early";
        }
        if (!file.direct && result > 0)
            ::posix_fadvise(file.fd, request.offset, request.length, POSIX_FADV_DONTNEED);
        std::lock_guard<std::mutex> hold(lock_);
        finish(request, error);
        return false;
    }

    void drive_pread() {
        for (;;) {
            Request request;
            {
                std::unique_lock<std::mutex> hold(lock_);
                work_.wait(hold, [&] { return closing_ || !queue_.empty(); });
                if (queue_.empty()) return;
                request = queue_.front();
                queue_.pop_front();
            }
            int64_t result;
            do {
                result = ::pread(request.file->fd, request.to, request.length, request.offset);
                if (result < 0) result = -errno;
            } while (again(request, result));
        }
    }

#ifdef LOWBIT_URING
    bool open_ring() {
        io_uring_params params{};
        ring_ = static_cast<int>(::syscall(__NR_io_uring_setup, depth_, &params));
        if (ring_ < 0) return false;  // an old kernel, or a sandbox that forbids it
        sq_bytes_ = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
        cq_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        sqes_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        sq_ = map(sq_bytes_, IORING_OFF_SQ_RING);
        cq_ = map(cq_bytes_, IORING_OFF_CQ_RING);
        sqes_ = map(sqes_bytes_, IORING_OFF_SQES);
        if (!sq_ || !cq_ || !sqes_) {
            close_ring();
            return false;
        }
        auto at = [](char* base, uint32_t offset) { return reinterpret_cast<uint32_t*>(base + offset); };
        sq_tail_ = at(sq_, params.sq_off.tail), sq_mask_ = *at(sq_, params.sq_off.ring_mask);
        sq_array_ = at(sq_, params.sq_off.array);
        cq_head_ = at(cq_, params.cq_off.head), cq_tail_ = at(cq_, params.cq_off.tail);
        cq_mask_ = *at(cq_, params.cq_off.ring_mask);
        cqes_ = reinterpret_cast<io_uring_cqe*>(cq_ + params.cq_off.cqes);
        return true;
    }

    char* map(size_t bytes, uint64_t what) {
        void* at = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, what);
        return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
    }

    void close_ring() {
        if (sq_) ::munmap(sq_, sq_bytes_);
        if (cq_) ::munmap(cq_, cq_bytes_);
        if (sqes_) ::munmap(sqes_, sqes_bytes_);
        sq_ = cq_ = sqes_ = nullptr;
        if (ring_ >= 0) ::close(ring_);
        ring_ = -1;
    }

    // One thread owns the ring: it keeps up to `depth` reads in flight and sleeps in the kernel until one is done.
    void drive_ring() {
        std::vector<Request> slots(depth_);
        std::vector<iovec> vectors(depth_);
        std::vector<uint32_t> free;
        for (unsigned i = 0; i < depth_; ++i) free.push_back(i);
        auto push = [&](uint32_t slot) {
            const Request& request = slots[slot];
            vectors[slot] = {request.to, request.length};
            uint32_t tail = *sq_tail_, index = tail & sq_mask_;
            auto* sqe = reinterpret_cast<io_uring_sqe*>(sqes_) + index;
            std::memset(sqe, 0, sizeof *sqe);
            sqe->opcode = IORING_OP_READV;
            sqe->fd = request.file->fd;
            sqe->off = request.offset;
            sqe->addr = reinterpret_cast<uint64_t>(&vectors[slot]);
            sqe->len = 1;
            sqe->user_data = slot;
            sq_array_[index] = index;
            __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
        };
        uint32_t unsent = 0;
        for (;;) {
            {
                std::unique_lock<std::mutex> hold(lock_);
                if (free.size() == depth_) {
                    work_.wait(hold, [&] { return closing_ || !queue_.empty(); });
                    if (queue_.empty()) return;
                }
                while (!free.empty() && !queue_.empty()) {
                    slots[free.back()] = queue_.front();
                    queue_.pop_front();
                    push(free.back());
                    free.pop_back();
                    ++unsent;
                }
            }
            long sent = ::syscall(__NR_io_uring_enter, ring_, unsent, 1u, IORING_ENTER_GETEVENTS, nullptr, 0);
            if (sent > 0) unsent -= static_cast<uint32_t>(sent);
            if (sent < 0 && errno != EINTR && errno != EAGAIN && errno != EBUSY) {
                std::string error = std::string("io_uring: ") + std::strerror(errno);
                std::lock_guard<std::mutex> hold(lock_);
                closing_ = true;  // nothing more can be known of what is in flight
                for (unsigned i = 0; i < depth_; ++i)
                    if (std::find(free.begin(), free.end(), i) == free.end()) finish(slots[i], error);
                for (auto& request : queue_) finish(request, error);
                queue_.clear();
                return;
            }
            uint32_t head = *cq_head_;
            for (; head != __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE); ++head) {
                const io_uring_cqe& cqe = cqes_[head & cq_mask_];
                uint32_t slot = static_cast<uint32_t>(cqe.user_data);
                if (again(slots[slot], cqe.res)) {
                    push(slot);
                    ++unsent;
                } else {
                    free.push_back(slot);
                }
            }
            __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
        }
    }

    int ring_ = -1;
    char *sq_ = nullptr, *cq_ = nullptr, *sqes_ = nullptr;
    size_t sq_bytes_ = 0, cq_bytes_ = 0, sqes_bytes_ = 0;
    uint32_t *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    uint32_t sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
#else
    bool open_ring() { return false; }
    void close_ring() {}
    void drive_ring() {}
#endif

    void release() {
        close_ring();
        for (auto& file : files_) {
            if (file.fd >= 0) ::close(file.fd);
            file.fd = -1;
        }
    }

    unsigned depth_;
    uint64_t request_;
    std::vector<File> files_;
    bool uring_ = false;
    std::mutex lock_;
    std::condition_variable work_, done_;
    std::deque<Request> queue_;
    std::unordered_map<uint64_t, State> tickets_;
    uint64_t next_ = 1;
    bool closing_ = false;
    const pid_t owner_ = ::getpid();
    std::vector<std::thread> workers_;
};

}  // namespace

void bind_reader(nb::module_& m) {
    nb::class_<Reader>(m, "Reader")
        .def(nb::init<const std::vector<std::string>&, unsigned, uint64_t, const std::string&, bool>(),
             nb::arg("paths"), nb::arg("depth"), nb::arg("request"), nb::arg("engine"), nb::arg("direct"))
        .def("submit", &Reader::submit, nb::arg("file"), nb::arg("offset"), nb::arg("length"), nb::arg("address"),
             nb::call_guard<nb::gil_scoped_release>())
        .def("wait", &Reader::wait, nb::arg("ticket"), nb::call_guard<nb::gil_scoped_release>())
        .def("close", &Reader::close, nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("engine", &Reader::engine)
        .def_prop_ro("direct", &Reader::direct);
}
