/* Makes system calls that write below a directory fail, one at a time.

   gcc -shared -fPIC -O1 -o inject.so inject.c -ldl, and LD_PRELOAD=inject.so. The program
   arms it by fault_arm; from then on the calls below are counted, and the one of the
   given number fails with an errno. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[PATH_MAX];
static size_t below_length;
static atomic_long calls, failing;
static int error;
static char last[PATH_MAX + 64];

/* Counts calls below `directory`; that of number `at` fails with `code`. 0 counts only. */
void fault_arm(const char *directory, long at, int code) {
  below_length = 0;
  atomic_store(&calls, 0);
  atomic_store(&failing, at);
  error = code;
  last[0] = 0;
  snprintf(below, sizeof below, "%s", directory);
  below_length = strlen(below);
}

long fault_calls(void) { return atomic_load(&calls); }

/* The call that failed, and on what; empty if none did. */
const char *fault_last(void) { return last; }

static int fails(const char *name, const char *path) {
  if (!below_length || strncmp(path, below, below_length)) return 0;
  if (atomic_fetch_add(&calls, 1) + 1 != atomic_load(&failing)) return 0;
  snprintf(last, sizeof last, "%s %s", name, path + below_length);
  errno = error;
  return 1;
}

static int fails_of(const char *name, int descriptor) {
  if (!below_length) return 0;
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(name, path);
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OF_DESCRIPTOR(type, name, parameters, arguments) \
  type name parameters { \
    NEXT(name); \
    if (fails_of(#name, descriptor)) return -1; \
    return next arguments; \
  }

#define OF_PATH(name, parameters, arguments) \
  int name parameters { \
    NEXT(name); \
    if (fails(#name, path)) return -1; \
    return next arguments; \
  }

OF_DESCRIPTOR(ssize_t, write, (int descriptor, const void *data, size_t size),
              (descriptor, data, size))
OF_DESCRIPTOR(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t at),
              (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, pwrite64,
              (int descriptor, const void *data, size_t size, off64_t at),
              (descriptor, data, size, at))
OF_DESCRIPTOR(ssize_t, writev, (int descriptor, const struct iovec *parts, int count),
              (descriptor, parts, count))
OF_DESCRIPTOR(int, fsync, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, fdatasync, (int descriptor), (descriptor))
OF_DESCRIPTOR(int, ftruncate, (int descriptor, off_t size), (descriptor, size))
OF_DESCRIPTOR(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size))
OF_PATH(mkdir, (const char *path, mode_t mode), (path, mode))
OF_PATH(rename, (const char *path, const char *to), (path, to))
OF_PATH(mkdirat, (int directory, const char *path, mode_t mode), (directory, path, mode))
OF_PATH(renameat, (int from, const char *path, int in, const char *to),
        (from, path, in, to))

/* What comes before `flags` is given once more, as it is passed on. */
#define OPENS(name, parameters, ...) \
  int name parameters { \
    NEXT(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = va_arg(rest, mode_t); \
    va_end(rest); \
    if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(#name, path)) return -1; \
    return next(__VA_ARGS__, flags, mode); \
  }

OPENS(open, (const char *path, int flags, ...), path)
OPENS(open64, (const char *path, int flags, ...), path)
OPENS(openat, (int directory, const char *path, int flags, ...), directory, path)
OPENS(openat64, (int directory, const char *path, int flags, ...), directory, path)
