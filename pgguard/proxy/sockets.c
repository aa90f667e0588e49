/* pgguard.proxy.sockets in C: the same classes and functions as in sockets.py, which says what they are for.
 *
 * What that saves is nothing of the system's, but what the interpreter does around it: parse arguments, keep a deadline,
 * make a chunk for what are a hundred bytes, raise an exception where there is nothing, and give up its lock and take it
 * again. No call here gives that up which doesn't wait, and MSG_DONTWAIT sees to it that it doesn't, whatever the socket.
 * epoll_wait(2) is where other threads get it: in each round of the relay.
 *
 * The lock guards what is static here, too. As the module doesn't say that it can do without one, or with one of several,
 * no interpreter runs it so.
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define SMALL 16384 /* bytes up to which to copy what has come costs less than to hand it out and make another buffer */
#define MOST 256    /* events that are returned at once at most */

#define METHOD(name, function, flags) {name, (PyCFunction)(void (*)(void))(function), flags, NULL}
#define END {NULL, NULL, 0, NULL}

/* Whether a method was given as many arguments as it takes; otherwise there is an exception. */
static int
takes(Py_ssize_t wanted, Py_ssize_t count)
{
    if (count != wanted)
        PyErr_Format(PyExc_TypeError, "%zd arguments are taken, and %zd were given", wanted, count);
    return count == wanted;
}

/* A number as it is in C; -1 with an exception if it is none of those. */
static int
int_of(PyObject *wanted)
{
    long number = PyLong_AsLong(wanted);
    if (number < INT_MIN || number > INT_MAX) {
        PyErr_SetString(PyExc_OverflowError, "the number is too large");
        return -1;
    }
    return (int)number;
}

/* Whether a call has failed as it would have to wait. */
static int
would_wait(void)
{
    return errno == EAGAIN || errno == EWOULDBLOCK;
}

/* The system calls of each message. In the C library they are points at which a thread may be cancelled: each of them
 * takes two locked instructions as soon as there are several threads, and no thread here is ever cancelled. Elsewhere
 * they may not exist by themselves: socketcall(2). */

#if defined(__x86_64__) || defined(__aarch64__)
#define RECEIVE(fd, place, size, flags) syscall(SYS_recvfrom, fd, place, size, flags, NULL, NULL)
#define RECEIVE_MESSAGE(fd, message, flags) syscall(SYS_recvmsg, fd, message, flags)
#define SEND(fd, first, size, flags) syscall(SYS_sendto, fd, first, size, flags, NULL, 0)
#else
#define RECEIVE recv
#define RECEIVE_MESSAGE recvmsg
#define SEND send
#endif

/* Addresses, as the socket module has them */

typedef union {
    struct sockaddr any;
    struct sockaddr_in ipv4;
    struct sockaddr_in6 ipv6;
    struct sockaddr_un unix_;
} Address;

/* A host and a port, and more with IPv6; of anything else nothing: an empty string. */
static PyObject *
told(const Address *address)
{
    char host[INET6_ADDRSTRLEN];
    if (address->any.sa_family == AF_INET) {
        inet_ntop(AF_INET, &address->ipv4.sin_addr, host, sizeof host);
        return Py_BuildValue("si", host, ntohs(address->ipv4.sin_port));
    }
    if (address->any.sa_family == AF_INET6) {
        inet_ntop(AF_INET6, &address->ipv6.sin6_addr, host, sizeof host);
        return Py_BuildValue("siII", host, ntohs(address->ipv6.sin6_port), ntohl(address->ipv6.sin6_flowinfo),
                             address->ipv6.sin6_scope_id);
    }
    return PyUnicode_FromString("");
}

/* What is connected to: the path of a Unix socket, or a host's number and a port. Returns its size; 0 with an exception. */
static socklen_t
understood(PyObject *target, Address *address)
{
    memset(address, 0, sizeof *address);
    if (PyUnicode_Check(target)) {
        PyObject *path = PyUnicode_EncodeFSDefault(target);
        if (path == NULL)
            return 0;
        size_t size = (size_t)PyBytes_GET_SIZE(path);
        int is_abstract = size > 0 && PyBytes_AS_STRING(path)[0] == '\0'; /* it has no NUL at its end: unix(7) */
        int fits = size + !is_abstract <= sizeof address->unix_.sun_path;
        if (fits) {
            address->unix_.sun_family = AF_UNIX;
            memcpy(address->unix_.sun_path, PyBytes_AS_STRING(path), size);
        } else {
            PyErr_SetString(PyExc_OSError, "AF_UNIX path too long");
        }
        Py_DECREF(path);
        return fits ? (socklen_t)(offsetof(struct sockaddr_un, sun_path) + size + !is_abstract) : 0;
    }
    const char *host;
    int port, flow = 0, scope = 0;
    if (!PyTuple_Check(target)) {
        PyErr_Format(PyExc_TypeError, "an address is a string or a tuple, and no %.100s", Py_TYPE(target)->tp_name);
        return 0;
    }
    if (!PyArg_ParseTuple(target, "si|ii", &host, &port, &flow, &scope))
        return 0;
    if (port < 0 || port > UINT16_MAX) {
        PyErr_SetString(PyExc_OverflowError, "a port is a number from 0 to 65535");
        return 0;
    }
    if (inet_pton(AF_INET, host, &address->ipv4.sin_addr) == 1) {
        address->ipv4.sin_family = AF_INET;
        address->ipv4.sin_port = htons((uint16_t)port);
        return sizeof address->ipv4;
    }
    if (inet_pton(AF_INET6, host, &address->ipv6.sin6_addr) == 1) {
        address->ipv6.sin6_family = AF_INET6;
        address->ipv6.sin6_port = htons((uint16_t)port);
        address->ipv6.sin6_flowinfo = htonl((uint32_t)flow);
        address->ipv6.sin6_scope_id = (uint32_t)scope;
        return sizeof address->ipv6;
    }
    PyErr_Format(PyExc_ValueError, "%s is no IP address", host);
    return 0;
}

/* Stream. It takes no part in the collection of cycles, as it refers to nothing. */

typedef struct {
    PyObject_HEAD
    int fd; /* its descriptor; -1 when it is closed: the number may be another file's then */
} Stream;

/* Where bytes are received: an object that nobody else has. NULL: it has been handed out. */
static PyObject *buffer = NULL;

/* Have room for so many bytes in it. Returns how many those are; -1 with an exception. */
static Py_ssize_t
make_room(PyObject *wanted)
{
    Py_ssize_t size = PyLong_AsSsize_t(wanted);
    if (size < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a size can't be negative");
        return -1;
    }
    if (buffer == NULL || PyBytes_GET_SIZE(buffer) < size) {
        Py_XSETREF(buffer, PyBytes_FromStringAndSize(NULL, size));
        if (buffer == NULL)
            return -1;
    }
    return size;
}

/* The first bytes of it, which have been received. Nothing may run in between that could receive others. */
static PyObject *
take(Py_ssize_t size)
{
    if (size <= SMALL)
        return PyBytes_FromStringAndSize(PyBytes_AS_STRING(buffer), size);
    PyObject *data = buffer;
    buffer = NULL;
    if (PyBytes_GET_SIZE(data) != size)
        (void)_PyBytes_Resize(&data, size); /* if it fails, data is NULL, and there is an exception */
    return data;
}

static PyObject *
stream_receive(PyObject *self, PyObject *wanted)
{
    Py_ssize_t size = make_room(wanted);
    if (size < 0)
        return NULL;
    ssize_t got;
    do {
        got = RECEIVE(((Stream *)self)->fd, PyBytes_AS_STRING(buffer), (size_t)size, MSG_DONTWAIT);
    } while (got < 0 && errno == EINTR);
    if (got >= 0)
        return take(got);
    if (would_wait())
        Py_RETURN_NONE;
    return PyErr_SetFromErrno(PyExc_OSError);
}

static PyObject *
stream_receive_named(PyObject *self, PyObject *wanted)
{
    Py_ssize_t size = make_room(wanted);
    if (size < 0)
        return NULL;
    /* There is room for credentials and for nothing else: CREDENTIALS_SPACE in pgguard/attribution/senders.py. */
    union {
        struct cmsghdr aligned;
        char bytes[CMSG_SPACE(sizeof(struct ucred))];
    } space;
    struct iovec place = {.iov_base = PyBytes_AS_STRING(buffer), .iov_len = (size_t)size};
    struct msghdr message = {.msg_iov = &place, .msg_iovlen = 1}; /* what musl pads it with is 0 for the system, too */
    ssize_t got;
    do {
        message.msg_control = &space;
        message.msg_controllen = sizeof space;
        got = RECEIVE_MESSAGE(((Stream *)self)->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (got < 0 && errno == EINTR);
    if (got < 0) {
        if (would_wait())
            Py_RETURN_NONE;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    long pid = -1;
    struct cmsghdr *said = CMSG_FIRSTHDR(&message);
    if (said != NULL && said->cmsg_level == SOL_SOCKET && said->cmsg_type == SCM_CREDENTIALS
        && said->cmsg_len >= CMSG_LEN(sizeof(struct ucred))) {
        struct ucred credentials;
        memcpy(&credentials, CMSG_DATA(said), sizeof credentials);
        pid = credentials.pid;
    }
    PyObject *data = take(got);
    PyObject *who = data == NULL ? NULL : PyLong_FromLong(pid);
    PyObject *both = who == NULL ? NULL : PyTuple_New(2);
    if (both == NULL) {
        Py_XDECREF(data);
        Py_XDECREF(who);
        return NULL;
    }
    PyTuple_SET_ITEM(both, 0, data);
    PyTuple_SET_ITEM(both, 1, who);
    return both;
}

static PyObject *
stream_send(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (!takes(3, count))
        return NULL;
    PyObject *data = arguments[0];
    if (!PyBytes_Check(data)) {
        PyErr_Format(PyExc_TypeError, "bytes are sent, and no %.100s", Py_TYPE(data)->tp_name);
        return NULL;
    }
    Py_ssize_t begin = PyLong_AsSsize_t(arguments[1]);
    Py_ssize_t stop = begin == -1 && PyErr_Occurred() ? -1 : PyLong_AsSsize_t(arguments[2]);
    if (PyErr_Occurred())
        return NULL;
    if (begin < 0 || begin > stop || stop > PyBytes_GET_SIZE(data)) {
        PyErr_SetString(PyExc_ValueError, "there are no such bytes");
        return NULL;
    }
    const char *first = PyBytes_AS_STRING(data) + begin;
    ssize_t sent;
    do {
        sent = SEND(((Stream *)self)->fd, first, (size_t)(stop - begin), MSG_DONTWAIT | MSG_NOSIGNAL);
    } while (sent < 0 && errno == EINTR);
    if (sent < 0 && !would_wait())
        return PyErr_SetFromErrno(PyExc_OSError);
    return PyLong_FromSsize_t(sent < 0 ? 0 : sent);
}

static PyObject *
stream_fileno(PyObject *self, PyObject *Py_UNUSED(none))
{
    return PyLong_FromLong(((Stream *)self)->fd);
}

/* What a call has returned that returns nothing else than whether it failed. */
static PyObject *
done(int failed)
{
    if (failed < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    Py_RETURN_NONE;
}

static PyObject *
stream_shutdown(PyObject *self, PyObject *wanted)
{
    int how = int_of(wanted);
    return how == -1 && PyErr_Occurred() ? NULL : done(shutdown(((Stream *)self)->fd, how));
}

static PyObject *
stream_setsockopt(PyObject *self, PyObject *arguments)
{
    int level, option, number;
    Py_buffer bytes;
    if (PyArg_ParseTuple(arguments, "iii:setsockopt", &level, &option, &number))
        return done(setsockopt(((Stream *)self)->fd, level, option, &number, sizeof number));
    PyErr_Clear();
    if (!PyArg_ParseTuple(arguments, "iiy*:setsockopt", &level, &option, &bytes))
        return NULL;
    int failed = setsockopt(((Stream *)self)->fd, level, option, bytes.buf, (socklen_t)bytes.len);
    PyBuffer_Release(&bytes);
    return done(failed);
}

static PyObject *
stream_getsockopt(PyObject *self, PyObject *arguments)
{
    int level, option, size = 0, number = 0;
    if (!PyArg_ParseTuple(arguments, "ii|i:getsockopt", &level, &option, &size))
        return NULL;
    char bytes[1024];
    if (size < 0 || (size_t)size > sizeof bytes) {
        PyErr_SetString(PyExc_ValueError, "there is no option of that size");
        return NULL;
    }
    socklen_t length = size ? (socklen_t)size : sizeof number;
    if (getsockopt(((Stream *)self)->fd, level, option, size ? (void *)bytes : &number, &length) < 0)
        return PyErr_SetFromErrno(PyExc_OSError);
    return size ? PyBytes_FromStringAndSize(bytes, (Py_ssize_t)length) : PyLong_FromLong(number);
}

typedef int (*Name)(int, struct sockaddr *, socklen_t *);

static PyObject *
name_of(PyObject *self, Name name)
{
    Address address;
    socklen_t size = sizeof address;
    return name(((Stream *)self)->fd, &address.any, &size) < 0 ? PyErr_SetFromErrno(PyExc_OSError) : told(&address);
}

static PyObject *
stream_getsockname(PyObject *self, PyObject *Py_UNUSED(none))
{
    return name_of(self, getsockname);
}

static PyObject *
stream_getpeername(PyObject *self, PyObject *Py_UNUSED(none))
{
    return name_of(self, getpeername);
}

static PyObject *
stream_connect_ex(PyObject *self, PyObject *target)
{
    Address address;
    socklen_t size = understood(target, &address);
    if (!size)
        return NULL;
    return PyLong_FromLong(connect(((Stream *)self)->fd, &address.any, size) < 0 ? errno : 0);
}

static PyObject *
stream_detach(PyObject *self, PyObject *Py_UNUSED(none))
{
    int fd = ((Stream *)self)->fd;
    ((Stream *)self)->fd = -1;
    return PyLong_FromLong(fd);
}

static PyObject *
stream_close(PyObject *self, PyObject *Py_UNUSED(none))
{
    int fd = ((Stream *)self)->fd;
    ((Stream *)self)->fd = -1;
    /* That the peer has reset it is no error of closing it. */
    return done(fd >= 0 && close(fd) < 0 && errno != ECONNRESET ? -1 : 0);
}

/* One of a descriptor, which is closed if that can't be. */
static PyObject *
stream_of(PyTypeObject *type, int fd)
{
    Stream *self = (Stream *)type->tp_alloc(type, 0);
    if (self == NULL)
        close(fd);
    else
        self->fd = fd;
    return (PyObject *)self;
}

static PyObject *
stream_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", NULL};
    PyObject *sock;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O:Stream", names, &sock))
        return NULL;
    PyObject *detached = PyObject_CallMethod(sock, "detach", NULL);
    if (detached == NULL)
        return NULL;
    int fd = int_of(detached);
    Py_DECREF(detached);
    return fd == -1 && PyErr_Occurred() ? NULL : stream_of(type, fd);
}

static void
stream_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    if (((Stream *)self)->fd >= 0)
        close(((Stream *)self)->fd);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef stream_methods[] = {
    METHOD("receive", stream_receive, METH_O),
    METHOD("receive_named", stream_receive_named, METH_O),
    METHOD("send", stream_send, METH_FASTCALL),
    METHOD("fileno", stream_fileno, METH_NOARGS),
    METHOD("connect_ex", stream_connect_ex, METH_O),
    METHOD("shutdown", stream_shutdown, METH_O),
    METHOD("setsockopt", stream_setsockopt, METH_VARARGS),
    METHOD("getsockopt", stream_getsockopt, METH_VARARGS),
    METHOD("getsockname", stream_getsockname, METH_NOARGS),
    METHOD("getpeername", stream_getpeername, METH_NOARGS),
    METHOD("detach", stream_detach, METH_NOARGS),
    METHOD("close", stream_close, METH_NOARGS),
    END,
};

static PyType_Slot stream_slots[] = {
    {Py_tp_new, stream_new},
    {Py_tp_dealloc, stream_dealloc},
    {Py_tp_methods, stream_methods},
    {0, NULL},
};

static PyType_Spec stream_spec = {
    .name = "pgguard.proxy.sockets.Stream",
    .basicsize = sizeof(Stream),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = stream_slots,
};

/* Streams that are new */

static PyTypeObject *stream_type = NULL;

static PyObject *
module_accept(PyObject *Py_UNUSED(module), PyObject *listener)
{
    int listening = PyObject_AsFileDescriptor(listener), fd;
    if (listening < 0)
        return NULL;
    Address address = {.any.sa_family = AF_UNSPEC};
    do {
        socklen_t size = sizeof address;
        fd = accept4(listening, &address.any, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    } while (fd < 0 && errno == EINTR);
    if (fd < 0) {
        if (would_wait())
            Py_RETURN_NONE;
        return PyErr_SetFromErrno(PyExc_OSError);
    }
    PyObject *stream = stream_of(stream_type, fd);
    PyObject *peer = stream == NULL ? NULL : told(&address);
    PyObject *both = peer == NULL ? NULL : PyTuple_Pack(2, stream, peer);
    Py_XDECREF(stream);
    Py_XDECREF(peer);
    return both;
}

static PyObject *
module_unconnected(PyObject *Py_UNUSED(module), PyObject *wanted)
{
    int family = int_of(wanted);
    if (family == -1 && PyErr_Occurred())
        return NULL;
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    return fd < 0 ? PyErr_SetFromErrno(PyExc_OSError) : stream_of(stream_type, fd);
}

static PyMethodDef functions[] = {
    METHOD("accept", module_accept, METH_O),
    METHOD("unconnected", module_unconnected, METH_O),
    END,
};

/* Epoll */

typedef struct {
    PyObject_HEAD
    int fd;           /* -1 when it is closed */
    int room;         /* how many descriptors there is a place for */
    PyObject **whose; /* by descriptor, what is returned with its events; NULL if it isn't registered */
} Epoll;

/* Its descriptor; -1 with an exception if it is closed. */
static int
opened(PyObject *self)
{
    int fd = ((Epoll *)self)->fd;
    if (fd < 0)
        PyErr_SetString(PyExc_ValueError, "I/O operation on closed epoll object");
    return fd;
}

/* Returns -1 with an exception if it can't be. */
static int
control(PyObject *self, int operation, int fd, PyObject *mask)
{
    int epoll = opened(self);
    if (epoll < 0)
        return -1;
    unsigned long events = mask == NULL ? 0 : PyLong_AsUnsignedLong(mask);
    if (events == (unsigned long)-1 && PyErr_Occurred())
        return -1;
    struct epoll_event event = {.events = (uint32_t)events, .data.fd = fd};
    if (epoll_ctl(epoll, operation, fd, &event) == 0)
        return 0;
    PyErr_SetFromErrno(PyExc_OSError);
    return -1;
}

/* Have a place for a descriptor. Returns -1 with an exception if there is no memory for it. */
static int
have_place(Epoll *self, int fd)
{
    if (fd < self->room)
        return 0;
    int room = fd < INT_MAX / 2 - 64 ? 2 * fd + 64 : INT_MAX;
    PyObject **whose = NULL;
    if ((size_t)room <= PY_SSIZE_T_MAX / sizeof *whose)
        whose = PyMem_Realloc(self->whose, (size_t)room * sizeof *whose);
    if (whose == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memset(whose + self->room, 0, (size_t)(room - self->room) * sizeof *whose);
    self->whose = whose;
    self->room = room;
    return 0;
}

static PyObject *
epoll_register(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (!takes(3, count))
        return NULL;
    int fd = PyObject_AsFileDescriptor(arguments[0]);
    /* A place is looked for when the system has said that there is such a descriptor. */
    if (fd < 0 || control(self, EPOLL_CTL_ADD, fd, arguments[1]) < 0)
        return NULL;
    if (have_place((Epoll *)self, fd) < 0) {
        (void)epoll_ctl(((Epoll *)self)->fd, EPOLL_CTL_DEL, fd, NULL);
        return NULL;
    }
    Py_XSETREF(((Epoll *)self)->whose[fd], Py_NewRef(arguments[2]));
    Py_RETURN_NONE;
}

static PyObject *
epoll_modify(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    if (!takes(2, count))
        return NULL;
    int fd = PyObject_AsFileDescriptor(arguments[0]);
    if (fd < 0 || control(self, EPOLL_CTL_MOD, fd, arguments[1]) < 0)
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *
epoll_unregister(PyObject *self, PyObject *watched)
{
    int fd = PyObject_AsFileDescriptor(watched);
    if (fd < 0 || control(self, EPOLL_CTL_DEL, fd, NULL) < 0)
        return NULL;
    Py_CLEAR(((Epoll *)self)->whose[fd]);
    Py_RETURN_NONE;
}

static PyObject *
epoll_poll(PyObject *self, PyObject *const *arguments, Py_ssize_t count)
{
    struct epoll_event events[MOST];
    if (!takes(2, count))
        return NULL;
    double seconds = PyFloat_AsDouble(arguments[0]);
    if (seconds == -1.0 && PyErr_Occurred())
        return NULL;
    long most = PyLong_AsLong(arguments[1]);
    if (most == -1 && PyErr_Occurred())
        return NULL;
    if (most < 1) {
        PyErr_SetString(PyExc_ValueError, "there is to be room for one event at least");
        return NULL;
    }
    int epoll = opened(self);
    if (epoll < 0)
        return NULL;
    double timeout = ceil(seconds * 1e3);
    int milliseconds = timeout < 0 ? -1 : timeout < INT_MAX ? (int)timeout : INT_MAX;
    int found;
    Py_BEGIN_ALLOW_THREADS
    found = epoll_wait(epoll, events, most < MOST ? (int)most : MOST, milliseconds);
    Py_END_ALLOW_THREADS
    if (found < 0) {
        if (errno != EINTR)
            return PyErr_SetFromErrno(PyExc_OSError);
        if (PyErr_CheckSignals() < 0)
            return NULL;
        found = 0;
    }
    PyObject *list = PyList_New(2 * (Py_ssize_t)found);
    if (list == NULL)
        return NULL;
    PyObject **whose = ((Epoll *)self)->whose;
    for (int at = 0; at < found; at++) {
        /* A file goes on being reported that was closed and is still open elsewhere: epoll(7), questions 6 and 7. */
        PyObject *who = whose[events[at].data.fd];
        PyObject *mask = PyLong_FromLong((long)events[at].events);
        if (mask == NULL) {
            Py_DECREF(list);
            return NULL;
        }
        PyList_SET_ITEM(list, 2 * at, Py_NewRef(who == NULL ? Py_None : who));
        PyList_SET_ITEM(list, 2 * at + 1, mask);
    }
    return list;
}

static PyObject *
epoll_fileno(PyObject *self, PyObject *Py_UNUSED(none))
{
    int fd = opened(self);
    return fd < 0 ? NULL : PyLong_FromLong(fd);
}

static int
epoll_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    for (int fd = 0; fd < ((Epoll *)self)->room; fd++)
        Py_VISIT(((Epoll *)self)->whose[fd]);
    return 0;
}

static int
epoll_clear(PyObject *self)
{
    for (int fd = 0; fd < ((Epoll *)self)->room; fd++)
        Py_CLEAR(((Epoll *)self)->whose[fd]);
    return 0;
}

static PyObject *
epoll_close(PyObject *self, PyObject *Py_UNUSED(none))
{
    int fd = ((Epoll *)self)->fd;
    ((Epoll *)self)->fd = -1;
    (void)epoll_clear(self);
    return done(fd >= 0 ? close(fd) : 0);
}

static PyObject *
epoll_closed(PyObject *self, void *Py_UNUSED(closure))
{
    return PyBool_FromLong(((Epoll *)self)->fd < 0);
}

static PyObject *
epoll_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, ":Epoll", names))
        return NULL;
    Epoll *self = (Epoll *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    self->fd = epoll_create1(EPOLL_CLOEXEC);
    if (self->fd < 0) {
        PyErr_SetFromErrno(PyExc_OSError);
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void
epoll_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    (void)epoll_clear(self);
    PyMem_Free(((Epoll *)self)->whose);
    if (((Epoll *)self)->fd >= 0)
        close(((Epoll *)self)->fd);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef epoll_methods[] = {
    METHOD("register", epoll_register, METH_FASTCALL),
    METHOD("modify", epoll_modify, METH_FASTCALL),
    METHOD("unregister", epoll_unregister, METH_O),
    METHOD("poll", epoll_poll, METH_FASTCALL),
    METHOD("fileno", epoll_fileno, METH_NOARGS),
    METHOD("close", epoll_close, METH_NOARGS),
    END,
};

static PyGetSetDef epoll_attributes[] = {
    {"closed", epoll_closed, NULL, NULL, NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot epoll_slots[] = {
    {Py_tp_new, epoll_new},
    {Py_tp_dealloc, epoll_dealloc},
    {Py_tp_traverse, epoll_traverse},
    {Py_tp_clear, epoll_clear},
    {Py_tp_methods, epoll_methods},
    {Py_tp_getset, epoll_attributes},
    {0, NULL},
};

static PyType_Spec epoll_spec = {
    .name = "pgguard.proxy.sockets.Epoll",
    .basicsize = sizeof(Epoll),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = epoll_slots,
};

/* The module */

static int
add_type(PyObject *module, PyType_Spec *spec)
{
    PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static int
execute(PyObject *module)
{
    if (add_type(module, &stream_spec) < 0 || add_type(module, &epoll_spec) < 0)
        return -1;
    PyObject *type = PyObject_GetAttrString(module, "Stream");
    Py_XSETREF(stream_type, (PyTypeObject *)type);
    return type == NULL ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "pgguard.proxy.sockets",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit_sockets(void)
{
    return PyModuleDef_Init(&definition);
}
