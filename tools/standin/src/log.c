/* The log of events: one line each, in the file that the variable STANDIN_LOG names. */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "standin.h"

static FILE *file;
static pthread_once_t once = PTHREAD_ONCE_INIT;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void open_file(void)
{
    const char *path = getenv("STANDIN_LOG");
    if (path == NULL)
        return;
    file = fopen(path, "a");
    if (file == NULL) {
        perror(path);
        abort(); /* a run without its log would pass every check */
    }
    setvbuf(file, NULL, _IOLBF, 0); /* a process that dies leaves whole lines */
}

/* Whether there is a log, so that callers can skip the preparation of a line. */
bool standin_logs(void)
{
    pthread_once(&once, open_file);
    return file != NULL;
}

void standin_log(const char *format, ...)
{
    if (!standin_logs())
        return;
    va_list values;
    va_start(values, format);
    pthread_mutex_lock(&lock);
    vfprintf(file, format, values);
    fputc('\n', file);
    pthread_mutex_unlock(&lock);
    va_end(values);
}

/* Called by the program under test (through ctypes) to divide the log into parts. */
void standin_mark(const char *text)
{
    standin_log("mark\t%s", text);
}

/* Called by generated functions at their first call. */
void standin_stub(const char *function)
{
    standin_log("stub\t%s", function);
}
