/* A network file system that misbehaves, as an LD_PRELOAD layer over the paths below one directory.
 *
 *     FLAKY_FS_ROOT     absolute path without symbolic links; only what is below it is affected
 *     FLAKY_FS_STATE    file of sizeof(struct state) zero bytes, elsewhere: what was injected, and who created what
 *     FLAKY_FS_SEED     of the random numbers; each process adds its pid
 *     FLAKY_FS_DELAY_MS each call waits for up to so many milliseconds
 *     FLAKY_FS_RATE     share of calls that fail with ESTALE or EIO; of reads and writes, a tenth of it
 *     FLAKY_FS_OUTAGE   PERIOD:LENGTH in ms: the server is away for LENGTH of every PERIOD, and every call fails
 *     FLAKY_FS_LATE_MS  another host does not see a new name for up to so many milliseconds
 *     FLAKY_FS_HOST     with the variable RANK, the name of this host: each rank is on a host of its own
 *
 * What a failure means, as NFS has it:
 *
 *     rename, unlink, rmdir, mkdir, link, open with O_EXCL   half of them have done it: the reply was lost
 *     fsync of a file    what was written last is gone, and the next fsync succeeds
 *     close              only of a file with unflushed writes; they are kept, and the descriptor is closed
 *     any other          nothing was done
 *
 * Not imitated: stale attributes and content of files that are there already, failures of mapped memory.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum op { OPEN, STAT, READ, WRITE, FSYNC, CLOSE, RENAME, UNLINK, MKDIR, LIST, OPS };
enum { NAMES = 1 << 16, FDS = 1 << 14, PAGE = 4096 };
enum { WATCHED = 1, DIRTY = 2 };

struct counts { _Atomic uint64_t calls, waited_us, estale, eio, lost_replies, hidden; };
struct created { _Atomic uint64_t inode, at_ms, host; };
struct state { struct counts counts[OPS]; struct created names[NAMES]; };

static char root[PATH_MAX];
static size_t root_length;
static struct state *state;
static uint64_t seed, host, late_ms, outage_period, outage_length;
static double rate, delay_ms;
static _Atomic uint64_t drawn;
static _Atomic unsigned char flags[FDS];

#define REAL(type, name, ...) static type (*real_##name)(__VA_ARGS__)
REAL(int, openat64, int, const char *, int, ...);
REAL(int, fstatat64, int, const char *, struct stat64 *, int);
REAL(int, faccessat, int, const char *, int, int);
REAL(ssize_t, read, int, void *, size_t);
REAL(ssize_t, pread64, int, void *, size_t, off64_t);
REAL(ssize_t, write, int, const void *, size_t);
REAL(int, fsync, int);
REAL(int, fdatasync, int);
REAL(int, close, int);
REAL(int, closedir, DIR *);
REAL(int, renameat, int, const char *, int, const char *);
REAL(int, linkat, int, const char *, int, const char *, int);
REAL(int, unlinkat, int, const char *, int);
REAL(int, mkdirat, int, const char *, mode_t);
REAL(DIR *, opendir, const char *);
REAL(struct dirent64 *, readdir64, DIR *);

static uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

static double random_unit(void) {
    uint64_t n = mix(seed ^ mix((uint64_t)getpid() << 32 ^ atomic_fetch_add(&drawn, 1)));
    return (double)(n >> 11) / (double)(1ull << 53);
}

static uint64_t now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static double number(const char *name) {
    const char *text = getenv(name);
    return text ? atof(text) : 0;
}

__attribute__((constructor)) static void start(void) {
    if (real_close) return;
#define FIND(name) real_##name = (__typeof__(real_##name))dlsym(RTLD_NEXT, #name)
    FIND(openat64); FIND(fstatat64); FIND(faccessat); FIND(read); FIND(pread64); FIND(write); FIND(fsync);
    FIND(fdatasync); FIND(closedir); FIND(renameat); FIND(linkat); FIND(unlinkat); FIND(mkdirat);
    FIND(opendir); FIND(readdir64); FIND(close);
    const char *file = getenv("FLAKY_FS_STATE"), *where = getenv("FLAKY_FS_ROOT"), *name = getenv("FLAKY_FS_HOST");
    if (!file || !where) return;
    int fd = real_openat64(AT_FDCWD, file, O_RDWR | O_CLOEXEC);
    void *map = fd < 0 ? MAP_FAILED : mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (fd >= 0) real_close(fd);
    if (map == MAP_FAILED) { fprintf(stderr, "flaky_fs: %s cannot be used\n", file); _exit(99); }
    snprintf(root, sizeof root, "%s", where);
    root_length = strlen(root);
    seed = (uint64_t)number("FLAKY_FS_SEED");
    rate = number("FLAKY_FS_RATE");
    delay_ms = number("FLAKY_FS_DELAY_MS");
    late_ms = (uint64_t)number("FLAKY_FS_LATE_MS");
    const char *outage = getenv("FLAKY_FS_OUTAGE");
    unsigned long period = 0, length = 0;
    if (outage && sscanf(outage, "%lu:%lu", &period, &length) == 2) outage_period = period, outage_length = length;
    const char *rank = getenv("RANK");
    for (host = 1; name && *name; name++) host = mix(host ^ (unsigned char)*name);
    for (; rank && *rank; rank++) host = mix(host ^ (unsigned char)*rank);
    state = map;
}

/* Whether a path is below the root; its absolute form in `full`. */
static int below(int dir, const char *path, char *full) {
    int saved = errno, found = 0;
    size_t n = 0;
    if (!real_close) start();
    if (!state || !path) return 0;
    full[0] = 0;
    if (path[0] != '/') {
        if (dir == AT_FDCWD) {
            if (getcwd(full, PATH_MAX)) n = strlen(full);
        } else {
            char link[64];
            snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
            ssize_t got = readlink(link, full, PATH_MAX - 1);
            n = got > 0 ? (size_t)got : 0;
        }
        if (n && n + 1 < PATH_MAX && *path) full[n++] = '/';
    }
    if (n + strlen(path) < PATH_MAX) {
        strcpy(full + n, path);
        found = strncmp(full, root, root_length) == 0 && full[root_length] == '/' && full[root_length + 1];
    }
    errno = saved;
    return found;
}

static int watched(int fd) {
    char full[PATH_MAX];
    if (!state || fd < 0 || fd >= FDS || !(flags[fd] & WATCHED)) return 0;
    if (below(fd, "", full)) return 1;
    flags[fd] = 0; /* closed by somebody else, and used again */
    return 0;
}

/* Wait; then return an error number, or 0. */
static int trouble(enum op op) {
    struct counts *c = &state->counts[op];
    atomic_fetch_add(&c->calls, 1);
    if (delay_ms > 0) {
        uint64_t us = (uint64_t)(1000 * delay_ms * random_unit());
        struct timespec t = {(time_t)(us / 1000000), (long)(us % 1000000) * 1000};
        nanosleep(&t, NULL);
        atomic_fetch_add(&c->waited_us, us);
    }
    double share = op == READ || op == WRITE ? rate / 10 : rate;
    int away = outage_period && now_ms() % outage_period < outage_length;
    if (!away && random_unit() >= share) return 0;
    int error = random_unit() < 0.5 ? ESTALE : EIO;
    atomic_fetch_add(error == EIO ? &c->eio : &c->estale, 1);
    return error;
}

/* As `trouble`, for what changes names: with `*lost`, it is to be done before the error is reported. */
static int change_trouble(enum op op, int *lost) {
    int error = trouble(op);
    int away = outage_period && now_ms() % outage_period < outage_length;
    *lost = error && !away && random_unit() < 0.5;
    if (*lost) atomic_fetch_add(&state->counts[op].lost_replies, 1);
    return error;
}

static int fail(int error) { errno = error; return -1; }

/* ---- who created which name, and when */

static uint64_t inode_of(int dir, const char *path, int at) {
    struct stat64 found;
    int saved = errno, code = real_fstatat64(dir, path, &found, at);
    errno = saved;
    return code == 0 ? found.st_ino : 0;
}

static void note_created(int dir, const char *path) {
    uint64_t inode = inode_of(dir, path, AT_SYMLINK_NOFOLLOW);
    if (!inode) return;
    struct created *c = &state->names[mix(inode) % NAMES];
    c->host = host;
    c->at_ms = now_ms();
    c->inode = inode;
}

static void note_seen_by_all(uint64_t inode) {
    struct created *c = &state->names[mix(inode) % NAMES];
    if (inode && c->inode == inode) c->inode = 0;
}

static int unseen(uint64_t inode) {
    struct created *c = &state->names[mix(inode) % NAMES];
    if (!inode || !late_ms || c->inode != inode || c->host == host) return 0;
    return now_ms() - c->at_ms < mix(inode ^ host ^ c->at_ms) % (late_ms + 1);
}

/* Whether this host does not see the path yet, or a folder that it is in. */
static int hidden(enum op op, char *full) {
    if (!late_ms) return 0;
    for (char *end = full + strlen(full); end > full + root_length; ) {
        char kept = *end;
        *end = 0;
        int no = unseen(inode_of(AT_FDCWD, full, AT_SYMLINK_NOFOLLOW));
        *end = kept;
        if (no) { atomic_fetch_add(&state->counts[op].hidden, 1); return 1; }
        do end--; while (end > full + root_length && *end != '/');
    }
    return 0;
}

/* ---- the calls */

static int open_any(int dir, const char *path, int how, mode_t mode) {
    char full[PATH_MAX];
    int error = 0, lost = 0;
    if (!below(dir, path, full)) return real_openat64(dir, path, how, mode);
    int creates = how & O_CREAT, only = creates && how & O_EXCL;
    error = only ? change_trouble(OPEN, &lost) : trouble(OPEN);
    if (error && !lost) return fail(error);
    if (!creates && hidden(OPEN, full)) return fail(ENOENT);
    int was_there = creates && inode_of(dir, path, 0) != 0;
    int fd = real_openat64(dir, path, how, mode);
    if (fd >= 0 && creates && !was_there) note_created(dir, path);
    if (fd >= 0 && error) { real_close(fd); return fail(error); }
    if (fd >= 0 && fd < FDS) flags[fd] = WATCHED;
    return fd;
}

#define OPEN_MODE(how) \
    mode_t mode = 0; \
    if ((how) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, how); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int how, ...) { OPEN_MODE(how) if (!real_close) start(); return open_any(AT_FDCWD, path, how, mode); }
int open64(const char *path, int how, ...) { OPEN_MODE(how) if (!real_close) start(); return open_any(AT_FDCWD, path, how, mode); }
int openat(int dir, const char *path, int how, ...) { OPEN_MODE(how) if (!real_close) start(); return open_any(dir, path, how, mode); }
int openat64(int dir, const char *path, int how, ...) { OPEN_MODE(how) if (!real_close) start(); return open_any(dir, path, how, mode); }

static int stat_any(int dir, const char *path, struct stat64 *found, int how) {
    char full[PATH_MAX];
    if (path && *path && below(dir, path, full)) {
        int error = trouble(STAT);
        if (error) return fail(error);
        if (hidden(STAT, full)) return fail(ENOENT);
    }
    return real_fstatat64(dir, path, found, how);
}

int stat64(const char *path, struct stat64 *found) { if (!real_close) start(); return stat_any(AT_FDCWD, path, found, 0); }
int lstat64(const char *path, struct stat64 *found) { if (!real_close) start(); return stat_any(AT_FDCWD, path, found, AT_SYMLINK_NOFOLLOW); }
int fstatat64(int dir, const char *path, struct stat64 *found, int how) { if (!real_close) start(); return stat_any(dir, path, found, how); }
#if __WORDSIZE == 64 /* there, both structures are the same */
int stat(const char *path, struct stat *found) { return stat64(path, (struct stat64 *)found); }
int lstat(const char *path, struct stat *found) { return lstat64(path, (struct stat64 *)found); }
int fstatat(int dir, const char *path, struct stat *found, int how) { return fstatat64(dir, path, (struct stat64 *)found, how); }
#endif

int faccessat(int dir, const char *path, int mode, int how) {
    char full[PATH_MAX];
    if (!real_close) start();
    if (below(dir, path, full)) {
        int error = trouble(STAT);
        if (error) return fail(error);
        if (hidden(STAT, full)) return fail(ENOENT);
    }
    return real_faccessat(dir, path, mode, how);
}
int access(const char *path, int mode) { return faccessat(AT_FDCWD, path, mode, 0); }

ssize_t read(int fd, void *to, size_t size) {
    int error;
    if (!real_close) start();
    if (watched(fd) && (error = trouble(READ))) return fail(error);
    return real_read(fd, to, size);
}

ssize_t pread64(int fd, void *to, size_t size, off64_t at) {
    int error;
    if (!real_close) start();
    if (watched(fd) && (error = trouble(READ))) return fail(error);
    return real_pread64(fd, to, size, at);
}

ssize_t write(int fd, const void *from, size_t size) {
    int error;
    if (!real_close) start();
    if (watched(fd)) {
        if ((error = trouble(WRITE))) return fail(error);
        flags[fd] |= DIRTY;
    }
    return real_write(fd, from, size);
}

static int flush(int fd, int (*real)(int)) {
    struct stat64 found;
    if (!watched(fd)) return real(fd);
    int error = trouble(FSYNC), dirty = flags[fd] & DIRTY;
    flags[fd] &= (unsigned char)~DIRTY;
    if (!error) return real(fd);
    if (dirty && real_fstatat64(fd, "", &found, AT_EMPTY_PATH) == 0 && S_ISREG(found.st_mode) && found.st_size) {
        static const char nothing[PAGE];
        off64_t lost = found.st_size < PAGE ? found.st_size : PAGE;
        if (pwrite64(fd, nothing, (size_t)lost, found.st_size - lost) < 0) return fail(errno);
    }
    return fail(error);
}

int fsync(int fd) { if (!real_close) start(); return flush(fd, real_fsync); }
int fdatasync(int fd) { if (!real_close) start(); return flush(fd, real_fdatasync); }

int close(int fd) {
    if (!real_close) start();
    int error = watched(fd) && flags[fd] & DIRTY ? trouble(CLOSE) : 0;
    if (fd >= 0 && fd < FDS) flags[fd] = 0;
    int code = real_close(fd);
    return error ? fail(error) : code;
}

int closedir(DIR *dir) {
    if (!real_close) start();
    int fd = dirfd(dir);
    if (fd >= 0 && fd < FDS) flags[fd] = 0;
    return real_closedir(dir);
}

static int rename_any(int from_dir, const char *from, int to_dir, const char *to) {
    char full[PATH_MAX], target[PATH_MAX];
    int lost;
    if (!below(from_dir, from, full) || !below(to_dir, to, target)) return real_renameat(from_dir, from, to_dir, to);
    int error = change_trouble(RENAME, &lost);
    if (error && !lost) return fail(error);
    if (hidden(RENAME, full)) return fail(ENOENT);
    uint64_t replaced = inode_of(to_dir, to, AT_SYMLINK_NOFOLLOW);
    int code = real_renameat(from_dir, from, to_dir, to);
    if (code) return code;
    if (replaced) note_seen_by_all(inode_of(to_dir, to, AT_SYMLINK_NOFOLLOW)); /* its name was known before */
    else note_created(to_dir, to);
    return error ? fail(error) : 0;
}

int rename(const char *from, const char *to) { if (!real_close) start(); return rename_any(AT_FDCWD, from, AT_FDCWD, to); }
int renameat(int a, const char *from, int b, const char *to) { if (!real_close) start(); return rename_any(a, from, b, to); }

enum change { ELSEWHERE, BELOW, REFUSED };

/* What a change of `path` meets before it is done: REFUSED with `*error`; else `*error` is reported once it is done. */
static enum change meet_change(enum op op, int dir, const char *path, char *full, int *error) {
    int lost;
    *error = 0;
    if (!real_close) start();
    if (!below(dir, path, full)) return ELSEWHERE;
    *error = change_trouble(op, &lost);
    return *error && !lost ? REFUSED : BELOW;
}

int linkat(int from_dir, const char *from, int to_dir, const char *to, int how) {
    char full[PATH_MAX];
    int error;
    if (meet_change(RENAME, to_dir, to, full, &error) == REFUSED) return fail(error);
    int code = real_linkat(from_dir, from, to_dir, to, how);
    return code == 0 && error ? fail(error) : code;
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int unlinkat(int dir, const char *path, int how) {
    char full[PATH_MAX];
    int error;
    enum change change = meet_change(UNLINK, dir, path, full, &error);
    if (change == REFUSED) return fail(error);
    if (change == BELOW) {
        if (hidden(UNLINK, full)) return fail(ENOENT);
        note_seen_by_all(inode_of(dir, path, AT_SYMLINK_NOFOLLOW)); /* the inode may be used again */
    }
    int code = real_unlinkat(dir, path, how);
    return code == 0 && error ? fail(error) : code;
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int dir, const char *path, mode_t mode) {
    char full[PATH_MAX];
    int error;
    enum change change = meet_change(MKDIR, dir, path, full, &error);
    if (change == REFUSED) return fail(error);
    int code = real_mkdirat(dir, path, mode);
    if (code == 0 && change == BELOW) note_created(dir, path);
    return code == 0 && error ? fail(error) : code;
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

DIR *opendir(const char *path) {
    char full[PATH_MAX];
    if (!real_close) start();
    if (below(AT_FDCWD, path, full)) {
        int error = trouble(LIST);
        if (!error && hidden(LIST, full)) error = ENOENT;
        if (error) { errno = error; return NULL; }
    }
    DIR *dir = real_opendir(path);
    if (dir && below(AT_FDCWD, path, full) && dirfd(dir) < FDS) flags[dirfd(dir)] = WATCHED;
    return dir;
}

static int is_dot(const char *name) { return !strcmp(name, ".") || !strcmp(name, ".."); }

struct dirent64 *readdir64(DIR *dir) {
    struct dirent64 *entry;
    if (!real_close) start();
    int here = late_ms && watched(dirfd(dir));
    do entry = real_readdir64(dir); while (here && entry && !is_dot(entry->d_name) && unseen(entry->d_ino));
    return entry;
}
#if __WORDSIZE == 64
struct dirent *readdir(DIR *dir) { return (struct dirent *)readdir64(dir); }
#endif
