/* SPDX-License-Identifier: Apache-2.0
 *
 * pgguard.attribution.ebpf.progress in C: the same class and function as in progress.py, which says what they are for.
 *
 * A look takes two loads. What that saves is what lies around them in Python: a memoryview's items, numbers made and
 * compared, a method called with its arguments in a tuple. And here the loads have the order that they need by the
 * language: the kernel writes with smp_store_release().
 */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stddef.h>
#include <stdint.h>
#include <structmember.h>

/* As in pgguard/attribution/ebpf/programs.py. */
#define TICKET_SHIFT 16
#define TICKETS (1 << TICKET_SHIFT)
#define WORD_SHIFT 48

typedef struct {
    PyObject_HEAD
    Py_buffer producer; /* its obj is NULL when it is closed */
    Py_buffer words;    /* and if there are none */
    long long taken;
} Progress;

static int
is_open(Progress *self)
{
    if (self->producer.obj == NULL)
        PyErr_SetString(PyExc_ValueError, "the memory has been let go of");
    return self->producer.obj != NULL;
}

static int64_t
produced_in(Progress *self)
{
    return __atomic_load_n((const int64_t *)self->producer.buf, __ATOMIC_ACQUIRE);
}

static int64_t
reached_in(Progress *self, int64_t ticket)
{
    if (self->words.obj == NULL)
        return 0;
    const uint64_t *words = self->words.buf;
    uint64_t word = __atomic_load_n(words + (ticket & (TICKETS - 1)), __ATOMIC_ACQUIRE);
    return (int64_t)(word >> WORD_SHIFT) == ticket >> TICKET_SHIFT ? (int64_t)(word & ((1ULL << WORD_SHIFT) - 1)) : 0;
}

static PyObject *
progress_produced(PyObject *self, PyObject *Py_UNUSED(none))
{
    return is_open((Progress *)self) ? PyLong_FromLongLong(produced_in((Progress *)self)) : NULL;
}

static PyObject *
progress_reached(PyObject *self, PyObject *wanted)
{
    int64_t ticket = PyLong_AsLongLong(wanted);
    if ((ticket == -1 && PyErr_Occurred()) || !is_open((Progress *)self))
        return NULL;
    return PyLong_FromLongLong(reached_in((Progress *)self, ticket));
}

static PyObject *
progress_glance(PyObject *self, PyObject *wanted)
{
    int64_t ticket = PyLong_AsLongLong(wanted);
    if ((ticket == -1 && PyErr_Occurred()) || !is_open((Progress *)self))
        return NULL;
    int64_t reached = ticket ? reached_in((Progress *)self, ticket) : 0;
    return PyLong_FromLongLong(produced_in((Progress *)self) == ((Progress *)self)->taken ? reached : -1);
}

static void
let_go(Progress *self)
{
    PyBuffer_Release(&self->producer);
    PyBuffer_Release(&self->words);
}

static PyObject *
progress_close(PyObject *self, PyObject *Py_UNUSED(none))
{
    let_go((Progress *)self);
    Py_RETURN_NONE;
}

/* Have a buffer of so many bytes at least, at an address at which they can be read eight at a time. */
static int
have(PyObject *memory, Py_buffer *buffer, Py_ssize_t least)
{
    if (PyObject_GetBuffer(memory, buffer, PyBUF_SIMPLE) < 0)
        return -1;
    if (buffer->len >= least && (uintptr_t)buffer->buf % sizeof(int64_t) == 0)
        return 0;
    PyBuffer_Release(buffer);
    PyErr_SetString(PyExc_ValueError, "the memory is too small, or isn't aligned");
    return -1;
}

static PyObject *
progress_new(PyTypeObject *type, PyObject *arguments, PyObject *keywords)
{
    static char *names[] = {"", "", NULL};
    PyObject *producer, *words = Py_None;
    if (!PyArg_ParseTupleAndKeywords(arguments, keywords, "O|O:Progress", names, &producer, &words))
        return NULL;
    Progress *self = (Progress *)type->tp_alloc(type, 0);
    if (self == NULL)
        return NULL;
    if (have(producer, &self->producer, sizeof(int64_t)) < 0
        || (words != Py_None && have(words, &self->words, TICKETS * sizeof(int64_t)) < 0)) {
        Py_DECREF(self);
        return NULL;
    }
    return (PyObject *)self;
}

static void
progress_dealloc(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    let_go((Progress *)self);
    type->tp_free(self);
    Py_DECREF(type);
}

static PyMethodDef progress_methods[] = {
    {"produced", progress_produced, METH_NOARGS, NULL},
    {"reached", progress_reached, METH_O, NULL},
    {"glance", progress_glance, METH_O, NULL},
    {"close", progress_close, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef progress_members[] = {
    {"taken", T_LONGLONG, offsetof(Progress, taken), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot progress_slots[] = {
    {Py_tp_new, progress_new},
    {Py_tp_dealloc, progress_dealloc},
    {Py_tp_methods, progress_methods},
    {Py_tp_members, progress_members},
    {0, NULL},
};

static PyType_Spec progress_spec = {
    .name = "pgguard.attribution.ebpf.progress.Progress",
    .basicsize = sizeof(Progress),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_IMMUTABLETYPE,
    .slots = progress_slots,
};

static PyObject *
module_fence(PyObject *Py_UNUSED(module), PyObject *Py_UNUSED(none))
{
    __atomic_thread_fence(__ATOMIC_ACQUIRE);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"fence", module_fence, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static int
execute(PyObject *module)
{
    PyObject *type = PyType_FromModuleAndSpec(module, &progress_spec, NULL);
    if (type == NULL)
        return -1;
    int failed = PyModule_AddType(module, (PyTypeObject *)type);
    Py_DECREF(type);
    return failed;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, execute},
    {0, NULL},
};

static PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "pgguard.attribution.ebpf.progress",
    .m_methods = functions,
    .m_slots = slots,
};

PyMODINIT_FUNC
PyInit_progress(void)
{
    return PyModuleDef_Init(&definition);
}
