// Ends a connection that it hasn't waited for.
const { Client } = require('pg')
const client = new Client()
client.connect()
client.end(() => console.log('ended'))
